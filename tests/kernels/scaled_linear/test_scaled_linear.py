"""Products of torch against the definition, what `auto` takes, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.kernels import dispatch
from megaseq.kernels.checks import KernelError
from megaseq.kernels.quantize import Quantized, quantize
from megaseq.kernels.scaled_linear import choice, scaled_linear
from megaseq.kernels.scaled_linear.cases import CASES, TOLERANCE, LinearCase
from megaseq.layers.activations import activation

CPU = torch.device("cpu")
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes an implementation the one that runs."""
    return lambda name: monkeypatch.setenv(dispatch.VARIABLE, f"scaled_linear={name}")


@pytest.mark.parametrize("implementation", ["auto", "fp32", "int_mm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torchs_products(case: LinearCase, implementation: str, use: Use) -> None:
    if implementation == "int_mm" and case.form == "e4m3":
        pytest.skip("e4m3 is no integer")
    x, weight, bias = case.tensors(device=CPU)
    for dtype in (torch.float32, torch.bfloat16):
        use(implementation)
        y = scaled_linear(x, weight=weight, bias=bias, activation=case.activation, dtype=dtype)
        use("reference")
        expected = scaled_linear(x, weight=weight, bias=bias, activation=case.activation, dtype=dtype)
        assert y.dtype is dtype and y.shape == (case.rows, case.columns)
        top = float(expected.abs().max())
        torch.testing.assert_close(y, expected, rtol=0.0, atol=TOLERANCE[dtype] * top)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_the_linear_map_of_what_was_quantised(case: LinearCase, use: Use) -> None:
    x, weight, bias = case.tensors(device=CPU)
    use("reference")
    y = scaled_linear(x, weight=weight, bias=bias, activation=case.activation, dtype=torch.float32)
    numbers = []
    for values, scales, block in (x, weight):
        index = torch.arange(values.shape[1]) // block
        numbers.append(values.double() * scales.double()[:, index])
    product = torch.einsum("mk,nk->mn", *numbers)
    expected = activation(case.activation)(product if bias is None else product + bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 70),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_are_exact(rows: int, width: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-128, 128, (n, width), generator=generator).to(torch.int8) for n in (rows, columns))
    scales = [torch.full((n, 1), 0.25) for n in (rows, columns)]
    y = scaled_linear(Quantized(x, scales[0], width), weight=Quantized(weight, scales[1], width), dtype=torch.float32)
    assert torch.equal(y, (x.long() @ weight.long().T).float() / 16)


@pytest.mark.skipif(not choice.SCALES_ROWS_IN_HOST_MEMORY, reason="before 2.12 torch has no such product on the host")
def test_torchs_own_product_of_e4m3(use: Use) -> None:
    case = LinearCase("aligned", rows=5, width=64, columns=32, form="e4m3")
    x, weight, _ = case.tensors(device=CPU)
    bias = torch.randn(32).bfloat16()
    use("scaled_mm")
    y = scaled_linear(x, weight=weight, bias=bias)
    use("reference")
    expected = scaled_linear(x, weight=weight, bias=bias)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("implementation", ["int_mm", "fp32"])
@pytest.mark.parametrize("width", [1, 2, 33, 65])
def test_strided_operands(implementation: str, width: int, use: Use) -> None:
    values = torch.randint(-127, 128, (3 * width, 14)).to(torch.int8)
    x, weight = values.t()[::2, ::3], values.t()[1::2, 2::3]
    scales = torch.rand(3, 7).t()
    use(implementation)
    for block in (width, 32):
        parts = -(-width // block)
        first, second = (
            Quantized(rows, scales[:, :1].expand(7, parts) if parts > 1 else scales[:, :1], block)
            for rows in (x, weight)
        )
        y = scaled_linear(first, weight=second, dtype=torch.float32)
        expected = (x.double() * scales[:, :1]) @ (weight.double() * scales[:, :1]).T
        torch.testing.assert_close(y, expected.float(), rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def test_any_leading_shape_and_no_rows() -> None:
    weight = quantize(torch.randn(7, 10))
    x = torch.randn(2, 3, 10)
    y = scaled_linear(quantize(x), weight=weight)
    assert y.shape == (2, 3, 7) and y.dtype is torch.bfloat16
    assert torch.equal(y[1, 2], scaled_linear(quantize(x[1, 2]), weight=weight))
    assert scaled_linear(quantize(x[:0]), weight=weight).shape == (0, 3, 7)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_what_is_not_finite_stays_so(form, use: Use) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, 64)
    x[1, 5] = torch.inf
    weight = quantize(torch.randn(8, 64), form=form, block=32)
    for block in (None, 32):
        y = scaled_linear(quantize(x, form=form, block=block), weight=weight, dtype=torch.float32)
        assert y.isnan().all(dim=1).tolist() == [False, True, False]
        assert torch.isfinite(y[::2]).all()


def test_what_auto_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made of shapes and capability alone: asked of tensors that are only said to be on a GPU."""
    monkeypatch.setattr(choice, "_on_gpu", lambda x: True)
    monkeypatch.setattr(choice.triton_runtime, "unable", lambda tensor: None)

    def taken(capability: tuple[int, int], **sizes: object) -> tuple[str, dict[str, str]]:
        monkeypatch.setattr(choice, "_capability", lambda x: capability)
        case = LinearCase("gpu", **{"rows": 64, "width": 64, "columns": 32, **sizes})  # type: ignore[arg-type]
        x, weight, _ = case.tensors(device=CPU)
        reasons = choice.impossible(x, weight=weight, activation=case.activation, dtype=torch.bfloat16)
        return choice.automatic(x, bias_dtype=None, reasons=reasons), reasons

    assert taken((9, 0), form="e4m3")[0] == "scaled_mm"
    assert taken((9, 0), form="e4m3", rows=4)[0] == "triton"
    assert taken((9, 0), form="e4m3", activation="gelu")[0] == "triton"
    assert taken((9, 0), form="e4m3", weight_block=32)[0] == "triton"
    assert taken((9, 0))[0] == "triton" and taken((8, 0))[0] == "triton" and taken((10, 0), form="e4m3")[0] == "triton"
    name, reasons = taken((8, 0), form="e4m3")
    assert name == "fp32" and "sm_89 or later); quantise to int8" in reasons["triton"]
    monkeypatch.setattr(choice.triton_runtime, "unable", lambda tensor: "Triton is not installed")
    assert taken((9, 0))[0] == "int_mm" and taken((9, 0), rows=4)[0] == "fp32"


X, WEIGHT = quantize(torch.ones(2, 40)), quantize(torch.ones(3, 40))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled_linear(X, weight=quantize(torch.ones(3, 41))), r"weight.values must have shape \[N, K\]"),
        (lambda: scaled_linear(X, weight=quantize(torch.ones(3, 40), form="e4m3")), "must have the format of x"),
        (
            lambda: scaled_linear(X, weight=WEIGHT, bias=torch.ones(2)),
            r"bias must have shape \[N\] = \[3\], but is \[2\]",
        ),
        (
            lambda: scaled_linear(X, weight=WEIGHT, bias=torch.ones(3).long()),
            "bias must be float32, bfloat16 or float16",
        ),
        (lambda: scaled_linear(X, weight=WEIGHT, dtype=torch.int8), "dtype must be float32"),
        (lambda: scaled_linear(X, weight=WEIGHT, activation="sine"), "activation must be one of relu, .* but is sine"),
        (lambda: scaled_linear(X, weight=WEIGHT, bias=torch.ones(3, requires_grad=True)), "bias must want no gradient"),
        (lambda: scaled_linear(Quantized(X.values, X.scales[:1], 40), weight=WEIGHT), "x.scales must have shape"),
        (lambda: scaled_linear(X, weight=Quantized(WEIGHT.values.float(), WEIGHT.scales, 40)), "weight.values must be"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


@pytest.mark.parametrize(
    ("implementation", "settings", "message"),
    [
        ("int_mm", {"form": "e4m3"}, "it takes int8"),
        ("int_mm", {"x_block": 16, "weight_block": 32}, "it takes blocks of one size"),
        ("scaled_mm", {}, "it takes e4m3 with one scale a row"),
        ("scaled_mm", {"form": "e4m3", "activation": "relu"}, "it gives bfloat16 and has no activation"),
        ("scaled_mm", {"form": "e4m3", "width": 40}, "it takes widths that 16 divides"),
        ("triton", {"weight_block": 24}, "its blocks are multiples of 32; quantise with block=128"),
    ],
)
def test_what_cannot_run_is_an_error(implementation: str, settings: dict[str, object], message: str, use: Use) -> None:
    case = LinearCase("impossible", **settings)  # type: ignore[arg-type]
    x, weight, _ = case.tensors(device=CPU)
    use(implementation)
    with pytest.raises(KernelError, match=message):
        scaled_linear(x, weight=weight, activation=case.activation)


def test_a_torch_without_the_product_is_named(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SCALES_ROWS_IN_HOST_MEMORY", False)
    x, weight, _ = LinearCase("aligned", rows=5, width=64, columns=32, form="e4m3").tensors(device=CPU)
    use("scaled_mm")
    with pytest.raises(KernelError, match=r"in host memory scales of rows need torch 2\.12 or later"):
        scaled_linear(x, weight=weight)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_torchs_products_compile_and_export(form) -> None:  # type: ignore[no-untyped-def]
    weight = quantize(torch.randn(6, 32), form=form)

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scaled_linear(quantize(x, form=form), weight=weight, activation="relu")

    x = torch.randn(3, 32)
    expected = Module()(x)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), expected)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_autocast_changes_nothing(form: str) -> None:
    x, weight = (quantize(torch.randn(rows, 40), form=form) for rows in (3, 5))  # type: ignore[arg-type]
    expected = scaled_linear(x, weight=weight, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scaled_linear(x, weight=weight, dtype=torch.float32), expected)
