"""The definition of quantisation: bounds of the error, saturation, scales, what is not finite, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megaseq.kernels import dispatch
from megaseq.kernels.checks import KernelError
from megaseq.kernels.quantize import FormatName, Quantized, dequantize, fake_quantize, quantize
from megaseq.kernels.quantize.e4m3 import decode_e4m3
from megaseq.kernels.quantize.formats import FORMATS
from megaseq.kernels.quantize.reference import reference_quantize

FORMS = tuple(FORMATS)
forms = st.sampled_from(FORMS)
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
rows = st.lists(numbers, min_size=1, max_size=40)


def half_step(value: float, *, form: str, scale: float) -> float:
    """Half the distance of the two numbers of the format on either side of `value`."""
    if form == "int8":
        return 0.5 * scale
    # 3 bits of mantissa; below 2^-6 numbers are 2^-9 apart.
    exponent = max(math.frexp(value / scale)[1] - 1, -6)
    return 0.5 * scale * 2.0 ** (exponent - 3)


@settings(max_examples=150, deadline=None)
@given(row=rows, form=forms, block=st.one_of(st.none(), st.integers(1, 50)), power_of_two=st.booleans())
def test_error_is_at_most_half_a_step(
    row: list[float], form: FormatName, block: int | None, power_of_two: bool
) -> None:
    x = torch.tensor(row)
    quantized = quantize(x, form=form, block=block, power_of_two=power_of_two)
    back = quantized.values.double() * quantized.scales.double().repeat_interleave(quantized.block)[: len(row)]
    for index, (before, after) in enumerate(zip(x.tolist(), back.tolist(), strict=True)):
        scale = float(quantized.scales[index // quantized.block])
        # The product with the inverse of the scale is off by 2 of 2^-24 at most.
        slack = abs(before) * 2.0**-22
        assert abs(before - after) <= half_step(before, form=form, scale=scale) + slack


@settings(max_examples=60, deadline=None)
@given(row=rows, form=forms, power_of_two=st.booleans())
def test_the_largest_magnitude_becomes_the_formats(row: list[float], form: FormatName, power_of_two: bool) -> None:
    x = torch.tensor(row)
    values = quantize(x, form=form, power_of_two=power_of_two).values.float().abs()
    largest = FORMATS[form].largest
    assert values.max() <= largest
    if x.abs().max() > largest * 2.0**-126:
        # A power of two is less than twice as large as the scale that it replaces; e4m3 rounds by 1/16 on top.
        assert values.max() >= (0.46 * largest if power_of_two else largest)


@settings(max_examples=60, deadline=None)
@given(row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1), exponent=st.integers(-60, 60), form=forms)
def test_powers_of_two_change_the_scales_alone(row: list[float], exponent: int, form: FormatName) -> None:
    x = torch.tensor(row)
    # Numbers that would lose bits on the way down are left out.
    x = torch.where(x.abs() < 1e-12, 0.0, x)
    before, after = quantize(x, form=form), quantize(x * 2.0**exponent, form=form)
    assert torch.equal(before.values.float(), after.values.float())
    if x.any():
        assert torch.equal(before.scales * 2.0**exponent, after.scales)


@settings(max_examples=60, deadline=None)
@given(row=rows, form=forms, block=st.integers(1, 50))
def test_scales_are_powers_of_two_where_asked(row: list[float], form: FormatName, block: int) -> None:
    x = torch.tensor(row)
    exact, rounded = (quantize(x, form=form, block=block, power_of_two=flag).scales for flag in (False, True))
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert (rounded >= exact).all() and (rounded < 2 * exact).all()


@pytest.mark.parametrize("form", FORMS)
def test_ties_go_to_even(form: FormatName) -> None:
    largest = FORMATS[form].largest
    steps = (
        torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5]) if form == "int8" else torch.tensor([17.0, 19.0, 21.0, -17.0])
    )
    values = quantize(torch.cat((torch.tensor([largest]), steps)), form=form).values.float()[1:]
    assert values.tolist() == ([0, 2, 2, -0.0, -2, 4] if form == "int8" else [16, 20, 20, -16])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_have_scale_one(form: FormatName, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0, 2.0, -2.0], [0.0, -0.0, 0.0, 0.0]], dtype=dtype)
    quantized = quantize(x, form=form, block=2)
    assert quantized.scales[0, 0] == 1.0 and (quantized.scales[1] == 1.0).all()
    assert not quantized.values.float()[1].any() and not quantized.values.float()[0, :2].any()
    assert torch.equal(dequantize(quantized, dtype=dtype), x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_comes_back_as_nan(form: FormatName, bad: float) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = bad
    quantized = quantize(x, form=form, block=4)
    assert quantized.scales.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert not quantized.values.float()[1, :4].any()
    expected = torch.zeros(3, 8, dtype=torch.bool)
    expected[1, :4] = True
    assert torch.equal(dequantize(quantized).isnan(), expected)
    assert torch.equal(fake_quantize(x, form=form, block=4).isnan(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_smallest_and_the_largest_numbers(form: FormatName) -> None:
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top / 2, -top / 4], [1e-44, 0.0], [2.0**-126, -(2.0**-126)]])
    back = dequantize(quantize(x, form=form))
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back[0], x[0], rtol=0.01, atol=0.0)
    assert (back - x).abs().max(dim=-1).values[1:].le(2.0**-126).all()


@pytest.mark.parametrize("form", FORMS)
def test_fake_is_there_and_back_with_the_gradient_of_the_identity(form: FormatName) -> None:
    x = torch.randn(4, 10, dtype=torch.bfloat16, requires_grad=True)
    y = fake_quantize(x, form=form, block=3)
    assert torch.equal(y, dequantize(quantize(x, form=form, block=3), dtype=torch.bfloat16))
    gradient = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient)
    quantized = quantize(x, form=form)
    assert not quantized.values.requires_grad and not quantized.scales.requires_grad


def test_every_e4m3_number_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found, expected = decode_e4m3(codes), codes.float()
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert torch.equal(found.signbit(), expected.signbit())


def test_any_shape_and_strides() -> None:
    x = torch.randn(6, 3, 10)
    for view in (x.transpose(0, 2), x[::2, :, 1:7:2], x[0, 0], x[:, :1].expand(6, 4, 10), x[:0]):
        quantized = quantize(view, block=4)
        expected = quantize(view.contiguous(), block=4)
        assert quantized.values.shape == view.shape and quantized.values.is_contiguous()
        assert torch.equal(quantized.values, expected.values) and torch.equal(quantized.scales, expected.scales)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.zeros(2, dtype=torch.int32)), "quantize: x must be float32, bfloat16 or float16, but"),
        (lambda: quantize(torch.zeros(())), r"quantize: x must have shape \[..., D\] with D at least 1, but is \[\]"),
        (lambda: quantize(torch.zeros(2, 0)), "with D at least 1"),
        (lambda: quantize(torch.zeros(2), form="e5m2"), "form must be one of int8, e4m3, but is e5m2"),  # type: ignore[arg-type]
        (lambda: quantize(torch.zeros(2), block=0), "block must be at least 1, but is 0"),
        (lambda: dequantize(quantize(torch.zeros(2)), dtype=torch.int8), "dequantize: dtype must be float32"),
        (lambda: dequantize(Quantized(torch.zeros(2), torch.ones(1), 2)), "values must be int8 or float8_e4m3fn"),
        (
            lambda: dequantize(Quantized(torch.zeros(4, dtype=torch.int8), torch.ones(1), 2)),
            r"scales must have shape \[..., ceil\(D / block\)\] = \[2\], but is \[1\]",
        ),
        (
            lambda: dequantize(Quantized(torch.zeros(4, dtype=torch.int8), torch.ones(2).half(), 2)),
            "scales must be float32",
        ),
    ],
)
def test_refusals(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KernelError, match=message):
        call()


def test_triton_on_the_host_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(dispatch.VARIABLE, "quantize=triton")
    with pytest.raises(KernelError, match="quantize: MEGASEQ_KERNELS must name an implementation that can run"):
        quantize(torch.zeros(2, 3))


def test_the_reference_compiles_and_exports() -> None:
    def back(x: torch.Tensor) -> torch.Tensor:
        return dequantize(quantize(x, form="e4m3", block=4)) + fake_quantize(x)

    x = torch.randn(3, 10)
    compiled = torch.compile(back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), back(x))

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return back(x)

    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), back(x))


def test_no_number_of_the_host_divides() -> None:
    """torch's CUDA kernels would multiply by its reciprocal, and scales would differ from the definition in a bit."""
    divisors: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket is torch.ops.aten.div:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        reference_quantize(torch.empty(3, 8, device="meta"), form="int8", block=4, power_of_two=False)
    assert divisors
    assert all(isinstance(divisor, torch.Tensor) and divisor.device.type == "meta" for divisor in divisors)
