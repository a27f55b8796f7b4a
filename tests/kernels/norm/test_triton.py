"""The norms' kernels against the reference in float64, all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels.checks import KernelError
from megaseq.kernels.norm import NormKind, add_norm, norm, norm_quantize
from megaseq.kernels.norm.cases import CASES, LAYER, RMS, TOLERANCE, NormCase
from megaseq.kernels.norm.configs import WIDEST, configs
from megaseq.kernels.norm.op import num_programs, triton_norm, triton_norm_backward, triton_norm_quantize
from megaseq.kernels.norm.reference import reference_norm
from megaseq.kernels.quantize.formats import FORMATS, FormatName
from megaseq.kernels.triton_runtime import override
from tests.kernels.graphs import check_graphs, check_op, relative_error
from tests.kernels.interpreter.poison import untouched_memory

FLOATS = list(TOLERANCE)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "norm=triton")


def precise(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in float64."""
    return {
        name: None if tensor is None else tensor.detach().double().requires_grad_() for name, tensor in tensors.items()
    }


def leaves(tensors: dict[str, Tensor | None], *names: str) -> list[Tensor]:
    """Those that there are."""
    return [tensor for name in names if (tensor := tensors[name]) is not None]


def some(like: Tensor, *, seed: int) -> Tensor:
    """A gradient that comes in: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*like.shape, 2, generator=generator, dtype=torch.float64)
    return wide.to(like.device, like.dtype)[..., 0]


def check(case: NormCase, *, dtype: torch.dtype, device: torch.device) -> None:
    """Asserts that both functions and all their gradients are the reference's."""
    tensors = case.tensors(dtype=dtype, device=device.type)
    exact = precise(tensors)
    x, residual, weight, bias = tensors.values()
    x64, residual64, weight64, bias64 = exact.values()
    assert x is not None and residual is not None and weight is not None
    assert x64 is not None and residual64 is not None and weight64 is not None
    y = norm(x, weight=weight, bias=bias, kind=case.kind)
    y64 = reference_norm(x64, weight=weight64, bias=bias64, kind=case.kind)
    pairs = [(y, y64)]
    dy = some(y, seed=1)
    names = ("x", "weight", "bias")
    found = torch.autograd.grad(y, leaves(tensors, *names), dy)
    pairs += zip(found, torch.autograd.grad(y64, leaves(exact, *names), dy.double()), strict=True)
    z, total = add_norm(x, residual=residual, weight=weight, bias=bias, kind=case.kind)
    assert torch.equal(total, residual + x)
    total64 = residual64 + x64
    # The sum that is normalised is the one that was rounded.
    rounded = total64 + (total.detach().double() - total64.detach())
    z64 = reference_norm(rounded, weight=weight64, bias=bias64, kind=case.kind)
    pairs.append((z, z64))
    dz, dtotal = some(z, seed=2), some(z, seed=3)
    found = torch.autograd.grad((z, total), leaves(tensors, "residual", *names), (dz, dtotal))
    expected = torch.autograd.grad((z64, total64), leaves(exact, "residual", *names), (dz.double(), dtotal.double()))
    pairs += zip(found, expected, strict=True)
    for have, want in pairs:
        assert have.dtype is dtype and have.shape == want.shape
        assert relative_error(have, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_results_and_gradients_of_the_reference(case: NormCase, dtype: torch.dtype, device: torch.device) -> None:
    check(case, dtype=dtype, device=device)


@pytest.mark.parametrize("width", [60, 1000, WIDEST])
def test_all_tile_sizes(width: int, device: torch.device) -> None:
    for config in configs(width):
        with override(norm=config, norm_backward=config):
            case = NormCase("", shape=(2 * config.blocks["ROWS"] + 1, width), kind=LAYER, biased=True)
            check(case, dtype=torch.float32, device=device)


def test_dtypes_may_differ(device: torch.device) -> None:
    """As under autocast: a bf16 branch, a float32 stream, float32 weights."""
    x, residual, weight = (torch.randn(3, 20, device=device) for _ in range(3))
    x, weight = x.bfloat16().requires_grad_(), weight[0].clone().requires_grad_()
    y, total = add_norm(x, residual=residual.requires_grad_(), weight=weight, kind=RMS)
    assert y.dtype is total.dtype is torch.float32 and torch.equal(total, residual + x)
    found = torch.autograd.grad((y.sin(), total), (x, residual, weight), (torch.ones_like(y), torch.ones_like(y)))
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    expected = reference_norm(residual + x, weight=weight, bias=None, kind=RMS)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    (of_weight,) = torch.autograd.grad(expected.sin().sum(), weight)
    torch.testing.assert_close(found[2], of_weight, rtol=1e-5, atol=1e-5)
    half = norm(x, weight=weight, kind=LAYER)
    assert half.dtype is torch.bfloat16


@pytest.mark.parametrize("only", ["x", "weight", "bias"])
def test_only_what_is_wanted_is_made(only: str, device: torch.device) -> None:
    tensors = NormCase("", kind=LAYER, biased=True).tensors(dtype=torch.float32, device=device.type)
    tensors = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    for group in (tensors, exact):
        leaf = group[only]
        assert leaf is not None
        leaf.requires_grad_()
    x, _, weight, bias = tensors.values()
    assert x is not None and weight is not None
    y = norm(x, weight=weight, bias=bias, kind=LAYER)
    x64, _, weight64, bias64 = exact.values()
    assert x64 is not None and weight64 is not None
    y64 = reference_norm(x64, weight=weight64, bias=bias64, kind=LAYER)
    (found,) = torch.autograd.grad(y.square().sum(), leaves(tensors, only))
    (expected,) = torch.autograd.grad(y64.square().sum(), leaves(exact, only))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_both_results_is_used(used: int, device: torch.device) -> None:
    x, residual, weight = (
        torch.randn(4, 9, device=device),
        torch.randn(4, 9, device=device),
        torch.rand(9, device=device),
    )
    x.requires_grad_(), weight.requires_grad_()
    output = add_norm(x, residual=residual, weight=weight, kind=RMS)[used]
    found = torch.autograd.grad(output.square().sum(), (x, weight), allow_unused=True)
    total = residual + x
    expected = (reference_norm(total, weight=weight, bias=None, kind=RMS), total)[used]
    wanted = torch.autograd.grad(expected.square().sum(), (x, weight), allow_unused=True)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, torch.zeros_like(weight) if want is None else want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = torch.zeros(shape, device=device).requires_grad_(), torch.ones(8, device=device).requires_grad_()
    y = norm(x, weight=weight, kind=LAYER)
    gradients = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == shape and gradients[0].shape == shape and (gradients[1] == 0).all()


def test_the_gradient_of_the_weights_is_the_same_in_every_run(device: torch.device) -> None:
    case = NormCase("", shape=(500, 24), kind=LAYER, biased=True)
    runs = []
    for _ in range(2):
        tensors = case.tensors(dtype=torch.float32, device=device.type)
        x, _, weight, bias = tensors.values()
        assert x is not None and weight is not None
        y = norm(x, weight=weight, bias=bias, kind=LAYER)
        runs.append(torch.autograd.grad(y.square().sum(), leaves(tensors, "weight", "bias")))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_values_that_are_not_finite_stay_in_their_row(device: torch.device) -> None:
    x = torch.randn(3, 40, device=device)
    x[1, 7] = float("nan")
    y = norm(x, weight=torch.ones(40, device=device), kind=LAYER)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summed", [False, True])
def test_quantised(
    form: FormatName, dtype: torch.dtype, summed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and form == "e4m3" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    tensors = NormCase("", shape=(5, 9, 130), kind=LAYER, biased=True, strided=True).tensors(dtype=dtype)
    x, residual, weight, bias = (None if t is None else t.detach().to(device) for t in tensors.values())
    assert x is not None and weight is not None
    results = []
    for implementation in ("triton", "reference"):
        monkeypatch.setenv("MEGASEQ_KERNELS", f"norm={implementation}")
        results.append(
            norm_quantize(x, weight=weight, bias=bias, residual=residual if summed else None, kind=LAYER, form=form)
        )
    (found, total), (expected, total_expected) = results
    assert found.values.dtype is FORMATS[form].dtype and found.block == 130
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
    if summed:
        assert torch.equal(total, total_expected)
    # The last bit of the norm decides which way a number in the middle is rounded, which few are.
    difference = (found.values.float() - expected.values.float()).abs()
    assert float((difference > 0).float().mean()) < 1e-3
    assert (difference <= (1.0 if form == "int8" else 32.0)).all()


@pytest.mark.parametrize("kind", [LAYER, NormKind(1e-6, add_one=True)])
def test_is_part_of_a_graph(kind: NormKind, device: torch.device) -> None:
    tensors = NormCase("", shape=(3, 5, 20), kind=kind, biased=True).tensors(dtype=torch.float32, device=device.type)
    x, residual, weight, bias = tensors.values()
    assert x is not None and residual is not None and weight is not None and bias is not None

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = norm(inputs[0], weight=inputs[2], bias=inputs[3], kind=kind)
        return (y, *add_norm(inputs[0], residual=inputs[1], weight=inputs[2], bias=inputs[3], kind=kind))

    check_graphs(function, x, residual, weight, bias)
    settings = kind.eps, kind.centred, kind.add_one
    check_op(triton_norm, x, residual, weight, bias, *settings)
    check_op(triton_norm, x, None, weight, None, *settings)
    x, weight = x.detach(), weight.detach()
    _, _, mean, rstd = triton_norm(x, None, weight, None, *settings)
    check_op(triton_norm_backward, x, None, x, weight, mean, rstd, *settings, [True, False])
    check_op(triton_norm_quantize, x, None, weight, None, *settings, "int8")


def test_rows_beyond_two_to_the_31(device: torch.device) -> None:
    with untouched_memory():
        memory = torch.empty(33 << 26, dtype=torch.float16, device=device)
    x = memory.as_strided((33, 40), (1 << 26, 1))
    values = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)).to(device).half()
    x.copy_(values)
    weight = torch.ones(40, device=device).requires_grad_()
    found = norm(x, weight=weight, kind=RMS)
    expected = norm(values, weight=weight, kind=RMS)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found, weight, x)
    assert torch.equal(gradient, torch.autograd.grad(expected, weight, values)[0])


def test_rows_that_do_not_fit_are_refused(device: torch.device) -> None:
    with pytest.raises(KernelError, match=f"its kernels hold rows of at most {WIDEST} elements, not {WIDEST + 1}"):
        norm(torch.zeros(1, WIDEST + 1, device=device), weight=torch.ones(WIDEST + 1, device=device), kind=RMS)


@pytest.mark.parametrize(("tiles", "programs"), [(1, 1), (2, 2), (5, 2), (24, 3), (64, 8), (100_000, 8)])
def test_programs_of_a_backward_pass(tiles: int, programs: int) -> None:
    """One for each of two multiprocessors, as long as none has 8 tiles; no more than 4 for each."""
    assert num_programs(tiles, device=torch.device("cpu")) == programs
