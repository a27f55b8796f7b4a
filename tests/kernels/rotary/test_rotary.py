"""Rotary positions: the reference against complex numbers, the kernel against the reference, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels.checks import KernelError
from megaseq.kernels.rotary import rotate
from megaseq.kernels.rotary.cases import CASES, TOLERANCE, RotaryCase
from megaseq.kernels.rotary.configs import configs
from megaseq.kernels.rotary.op import triton_rotate
from megaseq.kernels.rotary.reference import reference_rotate
from megaseq.kernels.triton_runtime import override
from tests.kernels.graphs import check_graphs, check_op, relative_error
from tests.kernels.interpreter.poison import untouched_memory


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "rotary=triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_multiplies_by_a_complex_number(case: RotaryCase) -> None:
    x, cosines, sines = case.tensors(dtype=torch.float64)
    found = reference_rotate(x, cosines=cosines, sines=sines, interleaved=case.interleaved)
    pairs = slice(0, case.width, 2) if case.interleaved else slice(0, case.width // 2)
    partners = slice(1, case.width, 2) if case.interleaved else slice(case.width // 2, case.width)
    turned = torch.complex(x[..., pairs], x[..., partners]) * torch.complex(cosines, sines)[..., pairs]
    torch.testing.assert_close(found[..., pairs], turned.real)
    torch.testing.assert_close(found[..., partners], turned.imag)
    assert torch.equal(found[..., case.width :], x[..., case.width :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    x, cosines, sines = RotaryCase("", head_dim=6, width=4, interleaved=interleaved).tensors(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda y: rotate(y, cosines=cosines, sines=sines, interleaved=interleaved), (x.detach().requires_grad_(),)
    )


def check(case: RotaryCase, *, dtype: torch.dtype, device: torch.device) -> None:
    """Asserts that result and gradient are the reference's in float64."""
    x, cosines, sines = case.tensors(dtype=dtype, device=device.type)
    exact = x.detach().double().requires_grad_()
    y = rotate(x, cosines=cosines, sines=sines, interleaved=case.interleaved)
    y64 = reference_rotate(exact, cosines=cosines.double(), sines=sines.double(), interleaved=case.interleaved)
    dy = torch.randn(*y.shape, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dy = dy.to(device, dtype)[..., 1]
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx64,) = torch.autograd.grad(y64, exact, dy.double())
    assert y.dtype is dx.dtype is dtype and dx.shape == x.shape
    assert relative_error(y, y64) < TOLERANCE[dtype]
    assert relative_error(dx, dx64) < TOLERANCE[dtype]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernel_is_the_reference(case: RotaryCase, dtype: torch.dtype, device: torch.device) -> None:
    check(case, dtype=dtype, device=device)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("config", configs(), ids=lambda config: f"{config.blocks['HEADS']}x{config.num_warps}")
def test_all_tile_sizes(config: object, device: torch.device) -> None:
    with override(rotary=config):  # type: ignore[arg-type]
        check(RotaryCase("", num_heads=35, head_dim=20, width=8), dtype=torch.float32, device=device)


@pytest.mark.usefixtures("forced")
def test_second_derivative(device: torch.device) -> None:
    x, cosines, sines = RotaryCase("").tensors(dtype=torch.float32, device=device.type)
    y = rotate(x, cosines=cosines, sines=sines)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    y64 = reference_rotate(exact, cosines=cosines.double(), sines=sines.double(), interleaved=False)
    (first64,) = torch.autograd.grad((y64**3).sum(), exact, create_graph=True)
    assert relative_error(second, torch.autograd.grad(first64.square().sum(), exact)[0]) < 1e-5


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("interleaved", [False, True])
def test_is_part_of_a_graph(interleaved: bool, device: torch.device) -> None:
    case = RotaryCase("", head_dim=10, width=6, interleaved=interleaved)
    x, cosines, sines = case.tensors(dtype=torch.float32, device=device.type)
    x = x.detach().requires_grad_()

    def function(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return rotate(y, cosines=c, sines=s, interleaved=interleaved)

    check_graphs(function, x, cosines, sines)
    check_op(triton_rotate, x, cosines, sines, interleaved, False)


def test_tokens_beyond_two_to_the_31(device: torch.device) -> None:
    with untouched_memory():
        memory = torch.empty(33 << 26, dtype=torch.float16, device=device)
    x = memory.as_strided((1, 33, 2, 8), (1, 1 << 26, 8, 1))
    values = torch.randn(1, 33, 2, 8, generator=torch.Generator().manual_seed(0)).to(device).half()
    x.copy_(values)
    angles = torch.rand(1, 33, 1, 8, device=device)
    assert torch.equal(
        triton_rotate(x, angles, angles, False, False), triton_rotate(values, angles, angles, False, False)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x must have shape \[B, T, N, H\]"),
        ({"x": torch.zeros(2, 3, 1, 8, dtype=torch.int64)}, "x must be floating point"),
        ({"cosines": torch.zeros(2, 3, 1, 5)}, "cosines must have an even width R from 2 to H = 8, but is 5"),
        ({"cosines": torch.zeros(2, 3, 1, 10)}, "cosines must have an even width R from 2 to H = 8, but is 10"),
        ({"sines": torch.zeros(2, 4, 1, 8)}, r"sines must have shape \[B or 1, T, 1, R\] = \[1\|2, 3, 1, 8\], but is"),
        ({"sines": torch.zeros(2, 3, 1, 8, device="meta")}, "sines must be on the device of x, cpu, but is meta"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    change: dict[str, Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "rotary=reference")
    angles = torch.zeros(2, 3, 1, 8)
    arguments = {"x": torch.zeros(2, 3, 1, 8), "cosines": angles, "sines": angles, **change}
    with pytest.raises(KernelError, match=f"rotary: {words}") as caught:
        rotate(arguments.pop("x"), **arguments)
    assert "\n" not in str(caught.value)


def test_what_torch_refuses_is_one_sentence() -> None:
    angles = torch.zeros(2, 4, 1, 8)
    with pytest.raises(
        KernelError, match=r"rotary: cosines must have shape .* = \[1\|2, 3, 1, 8\], but is \[2, 4, 1, 8\]"
    ):
        rotate(torch.zeros(2, 3, 1, 8), cosines=angles, sines=angles)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 1, 8)}, r"x must have shape \[B, T, N, H\]"),
        ({"x": torch.zeros(1, 3, 1, 8)}, r"cosines must have shape \[B or 1, T, 1, R\] = \[1\|1, 3, 1, 8\], but is"),
        ({"x": torch.zeros(2, 3, 1, 8, dtype=torch.int64)}, "x must be floating point, but is torch.int64"),
        ({"cosines": torch.zeros(2, 1, 1, 8), "sines": torch.zeros(2, 1, 1, 8)}, "cosines must have shape"),
        ({"cosines": torch.zeros(2, 3, 1, 7), "sines": torch.zeros(2, 3, 1, 7)}, "cosines must have an even width"),
        ({"cosines": torch.zeros(8), "sines": torch.zeros(8)}, r"cosines must have shape .* but is \[8\]"),
        ({"cosines": torch.zeros(())}, "cosines must have an even width R from 2 to H = 8, but is 0"),
        ({"sines": torch.zeros(2, 3, 1, 1)}, "sines must have shape"),
        ({"sines": torch.zeros(2, 3, 1, 8, dtype=torch.int64)}, "sines must be floating point, but is torch.int64"),
    ],
)
def test_what_torch_would_broadcast_is_one_sentence(change: dict[str, Tensor], words: str) -> None:
    angles = torch.zeros(2, 3, 1, 8)
    arguments = {"x": torch.zeros(2, 3, 1, 8), "cosines": angles, "sines": angles, **change}
    with pytest.raises(KernelError, match=f"rotary: {words}"):
        rotate(arguments.pop("x"), **arguments)
