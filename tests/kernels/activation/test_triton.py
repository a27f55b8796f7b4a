"""The activations' kernels against the reference in float64, with gradients."""

from __future__ import annotations

import pytest
import torch

from megaseq.kernels.activation import gated_activation
from megaseq.kernels.activation.cases import CASES, TOLERANCE, ActivationCase
from megaseq.kernels.activation.configs import configs
from megaseq.kernels.activation.op import triton_activation, triton_activation_backward
from megaseq.kernels.activation.reference import FUNCTIONS, reference_activation
from megaseq.kernels.triton_runtime import override
from tests.kernels.graphs import check_graphs, check_op, relative_error
from tests.kernels.interpreter.poison import untouched_memory


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "activation=triton")


def check(case: ActivationCase, *, dtype: torch.dtype, device: torch.device) -> None:
    """Asserts that result and gradient are the reference's."""
    x = case.tensor(dtype=dtype, device=device.type)
    exact = x.detach().double().requires_grad_()
    y = gated_activation(x, name=case.name, gated=case.gated)
    y64 = reference_activation(exact, name=case.name, gated=case.gated)
    dy = torch.randn(*y.shape, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dy = dy.to(device, dtype)[..., 1]
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx64,) = torch.autograd.grad(y64, exact, dy.double())
    assert y.shape == case.shape and y.dtype is dx.dtype is dtype
    assert relative_error(y, y64) < TOLERANCE[dtype]
    assert relative_error(dx, dx64) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.name}{'_gated' * case.gated}{'_strided' * case.strided}"
)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_results_and_gradients_of_the_reference(case: ActivationCase, dtype: torch.dtype, device: torch.device) -> None:
    check(case, dtype=dtype, device=device)


@pytest.mark.parametrize("config", configs(), ids=lambda config: f"{config.blocks['BLOCK']}x{config.num_warps}")
def test_all_tile_sizes(config: object, device: torch.device) -> None:
    with override(activation=config, activation_backward=config):  # type: ignore[arg-type]
        check(ActivationCase("gelu", gated=True, shape=(2, 2500)), dtype=torch.float32, device=device)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_number_is_close(name: str, device: torch.device) -> None:
    """Also near zero and far from it, where the error of a vector says nothing of the small ones."""
    x = torch.cat([torch.logspace(-6, 1.5, 200), -torch.logspace(-6, 1.5, 200), torch.zeros(1)]).to(device)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, y64 = gated_activation(x, name=name, gated=False), reference_activation(exact, name=name, gated=False)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-6)
    (dx,), (dx64,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(y64.sum(), exact)
    torch.testing.assert_close(dx.double(), dx64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_a_number_stays_so(name: str, device: torch.device) -> None:
    x = torch.tensor([float("nan"), 1.0], device=device).requires_grad_()
    y = gated_activation(x, name=name, gated=False)
    assert y.isnan().tolist() == [True, False]


@pytest.mark.parametrize("gated", [False, True])
def test_is_part_of_a_graph(gated: bool, device: torch.device) -> None:
    x = torch.randn(2, 3, 20, device=device).requires_grad_()
    check_graphs(lambda hidden: gated_activation(hidden, name="silu", gated=gated), x)
    check_op(triton_activation, x, "gelu_new", gated)
    y = x.detach()[..., :10] if gated else x.detach()
    check_op(triton_activation_backward, y, x.detach(), "relu2", gated)


def test_rows_beyond_two_to_the_31(device: torch.device) -> None:
    with untouched_memory():
        memory = torch.empty(33 << 26, dtype=torch.float16, device=device)
    x = memory.as_strided((33, 40), (1 << 26, 1))
    values = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)).to(device).half()
    x.copy_(values)
    assert torch.equal(triton_activation(x, "silu", True), triton_activation(values, "silu", True))
    dy = x[:, :20]
    assert torch.equal(
        triton_activation_backward(dy, x, "silu", True),
        triton_activation_backward(values[:, :20], values, "silu", True),
    )


def test_the_hyperbolic_tangent_is_right_near_zero(device: torch.device) -> None:
    """To its last bits, where a quotient of exponentials has lost them."""
    x = torch.logspace(-6, 0, 100, device=device)
    y = gated_activation(x, name="tanh", gated=False)
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=1e-6, atol=0)
