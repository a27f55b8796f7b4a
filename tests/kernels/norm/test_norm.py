"""Norms: the reference against torch's own, what is chosen, NVIDIA's apex, what is refused."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.checks import KernelError
from megaseq.kernels.norm import NormKind, add_norm, apex, norm, norm_quantize
from megaseq.kernels.norm.cases import CASES, LAYER, RMS, NormCase
from megaseq.kernels.norm.reference import reference_norm
from megaseq.kernels.quantize import dequantize, quantize


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_is_torchs(case: NormCase) -> None:
    tensors = case.tensors(dtype=torch.float64)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    assert x is not None and weight is not None
    found = reference_norm(x, weight=weight, bias=bias, kind=case.kind)
    factor = weight + 1 if case.kind.add_one else weight
    if case.kind.centred:
        expected = functional.layer_norm(x, weight.shape, factor, bias, case.kind.eps)
    else:
        expected = functional.rms_norm(x, weight.shape, factor, case.kind.eps)
        expected = expected if bias is None else expected + bias
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LAYER, RMS, NormKind(0.1, add_one=True)])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(kind: NormKind, biased: bool) -> None:
    tensors = NormCase("", shape=(2, 3, 5), kind=kind, biased=biased).tensors(dtype=torch.float64)
    inputs = tuple(tensor for tensor in tensors.values() if tensor is not None)

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual=residual, weight=weight, bias=bias, kind=kind)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LAYER, RMS, NormKind(1e-6, add_one=True)])
def test_in_host_memory_it_is_torchs_bit_by_bit(kind: NormKind, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 4, 30, dtype=dtype), torch.randn(30), torch.randn(30)
    factor = weight + 1 if kind.add_one else weight
    if kind.centred:
        expected = functional.layer_norm(x, (30,), factor, bias, kind.eps)
    else:
        expected = functional.rms_norm(x, (30,), factor.to(dtype), kind.eps)
    assert torch.equal(norm(x, weight=weight, bias=bias if kind.centred else None, kind=kind), expected)


@pytest.mark.parametrize("kind", [LAYER, RMS])
def test_a_tensor_without_values_keeps_what_one_in_host_memory_does(kind: NormKind) -> None:
    """The memory planner reads there what a step keeps: bfloat16 beside weights in float32 too."""

    def kept(device: str) -> list[tuple[torch.dtype, torch.Size]]:
        x = torch.randn(50, 30, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight, bias = torch.ones(30, device=device), torch.zeros(30, device=device)
        found: list[tuple[torch.dtype, torch.Size]] = []

        def note(tensor: Tensor) -> Tensor:
            found.append((tensor.dtype, tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            norm(x, weight=weight, bias=bias if kind.centred else None, kind=kind)
        return found

    assert kept("meta") == kept("cpu") != []


@pytest.mark.parametrize("kind", [LAYER, RMS, NormKind(1e-6, add_one=True)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_in_host_memory_it_is_the_reference(
    kind: NormKind, biased: bool, directed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if directed:
        monkeypatch.setenv("MEGASEQ_KERNELS", "norm=torch")
    x, residual, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 9), (3, 9), 9, 9))
    bias = bias if biased else None
    y, total = add_norm(x, residual=residual, weight=weight, bias=bias, kind=kind)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(y, reference_norm(total, weight=weight, bias=bias, kind=kind))
    assert torch.equal(norm(total, weight=weight, bias=bias, kind=kind), y)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_one_can_ask_for_each(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", f"norm={implementation}")
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = functional.layer_norm(x, (8,), weight, None, 1e-5)
    torch.testing.assert_close(norm(x, weight=weight, kind=LAYER), expected)


def test_quantised_is_norm_then_quantize() -> None:
    x, residual, weight = torch.randn(4, 5, 40), torch.randn(4, 5, 40), torch.rand(40)
    found = norm_quantize(x, residual=residual, weight=weight, kind=RMS)
    assert found.total is not None and torch.equal(found.total, residual + x)
    expected = quantize(reference_norm(residual + x, weight=weight, bias=None, kind=RMS))
    assert torch.equal(found.quantized.values, expected.values)
    assert torch.equal(found.quantized.scales, expected.scales)
    alone = norm_quantize(x, weight=weight, kind=LAYER, form="e4m3")
    assert alone.total is None
    torch.testing.assert_close(dequantize(alone.quantized), norm(x, weight=weight, kind=LAYER), rtol=2**-4, atol=2**-6)


# ---- NVIDIA's apex ---------------------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Puts modules where imports find them; nothing is remembered of them afterwards."""
    made = {}
    for name in (apex.EXTENSION, "apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
        made[name] = ModuleType(name)
        made[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        made[name].__path__ = []
    apex.missing.cache_clear()
    yield made
    apex.missing.cache_clear()


def install(modules: dict[str, ModuleType], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, modules[name])


def test_the_public_package_called_apex_is_not_mistaken_for_nvidias(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(modules, ["apex", "apex.normalization"], monkeypatch)
    assert "fused_layer_norm_cuda is not installed (the package apex of the public index" in (apex.missing() or "")


def test_an_extension_without_its_package_is_not_used(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not installed, or another package of that name, is named and not asked for."""
    install(modules, [apex.EXTENSION], monkeypatch)
    for name in ("apex.normalization.fused_layer_norm", "apex.normalization", "apex"):
        monkeypatch.setitem(sys.modules, name, None)
    reason = apex.missing() or ""
    assert "cannot be imported; build it anew" in reason and "pip install" not in reason


def test_an_apex_without_the_functions_is_not_used(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(modules, list(modules), monkeypatch)
    assert "has no fused_layer_norm_affine" in (apex.missing() or "")


def test_apex_is_called_as_it_wants(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    functions = modules["apex.normalization.fused_layer_norm"]
    functions.fused_layer_norm_affine = lambda x, w, b, shape, eps: functional.layer_norm(x, shape, w, b, eps)  # type: ignore[attr-defined]
    functions.fused_rms_norm_affine = lambda x, w, shape, eps: functional.rms_norm(x, shape, w, eps)  # type: ignore[attr-defined]
    install(modules, list(modules), monkeypatch)
    assert apex.missing() is None
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    for kind, found_bias in ((LAYER, bias), (RMS, None)):
        expected = reference_norm(x, weight=weight, bias=found_bias, kind=kind)
        torch.testing.assert_close(apex.apex_norm(x, weight=weight, bias=found_bias, kind=kind), expected)


def test_apex_in_host_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "norm=apex")
    with pytest.raises(KernelError, match=r"norm: .* is apex, and apex's norms run on a GPU, not on cpu"):
        norm(torch.zeros(2, 4), weight=torch.ones(4), kind=RMS)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x must be floating point, but is torch.int64"),
        ({"x": torch.zeros(())}, r"x must have shape \[..., D\] with D at least 1, but is \[\]"),
        ({"x": torch.zeros(3, 0)}, r"x must have shape \[..., D\] with D at least 1, but is \[3, 0\]"),
        ({"weight": torch.ones(5)}, r"weight must have shape \[D\] = \[4\], but is \[5\]"),
        ({"bias": torch.ones(4, device="meta")}, "bias must be on the device of x, cpu, but is meta"),
        ({"residual": torch.ones(2, 4)}, r"residual must have the shape of x = \[3, 4\], but is \[2, 4\]"),
        ({"residual": torch.ones(3, 4, device="meta")}, "residual must be on the device of x, cpu, but is meta"),
        ({"residual": torch.ones(3, 4, dtype=torch.int32)}, "residual must be floating point, but is torch.int32"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    change: dict[str, Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": torch.ones(4), **change}
    x = arguments.pop("x")
    for kernels in ("auto", "norm=reference"):
        monkeypatch.setenv("MEGASEQ_KERNELS", kernels)
        with pytest.raises(KernelError, match=f"add_norm: {words}") as caught:
            add_norm(x, kind=RMS, **arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [LAYER, RMS])
def test_what_torch_refuses_is_one_sentence(kind: NormKind) -> None:
    with pytest.raises(KernelError, match=r"norm: weight must have shape \[D\] = \[4\], but is \[5\]"):
        norm(torch.zeros(3, 4), weight=torch.ones(5), kind=kind)
    with pytest.raises(KernelError, match=r"norm: x must be floating point, but is torch\.int64"):
        norm(torch.zeros(3, 4, dtype=torch.int64), weight=torch.ones(4), kind=kind)


@pytest.mark.parametrize("kind", [LAYER, RMS])
@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (torch.ones(3, 4), None, r"weight must have shape \[D\] = \[4\], but is \[3, 4\]"),
        (torch.ones(4, dtype=torch.int64), None, "weight must be floating point, but is torch.int64"),
        (torch.ones(4), torch.ones(1), r"bias must have shape \[D\] = \[4\], but is \[1\]"),
        (torch.ones(4), torch.ones(2, 3, 4), r"bias must have shape \[D\] = \[4\], but is \[2, 3, 4\]"),
        (torch.ones(4), torch.ones(4, dtype=torch.int64), "bias must be floating point, but is torch.int64"),
    ],
)
def test_what_torch_would_broadcast_or_cast_is_one_sentence(
    weight: Tensor, bias: Tensor | None, words: str, kind: NormKind
) -> None:
    with pytest.raises(KernelError, match=f"norm: {words}"):
        norm(torch.zeros(2, 3, 4), weight=weight, bias=bias, kind=kind)


@pytest.mark.parametrize("kind", [LAYER, RMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_and_bias_of_any_dtype(kind: NormKind, dtype: torch.dtype, parameters: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=parameters), torch.randn(8)
    found = norm(x, weight=weight, bias=bias, kind=kind)
    expected = reference_norm(x, weight=weight, bias=bias, kind=kind)
    narrow = torch.bfloat16 in (dtype, parameters)
    torch.testing.assert_close(found, expected, **(dict(rtol=2e-2, atol=2e-2) if narrow else {}))


def test_what_cannot_be_quantised_is_one_sentence() -> None:
    x, weight = torch.zeros(3, 4), torch.ones(4)
    with pytest.raises(KernelError, match="norm_quantize: form must be one of int8, e4m3, but is int4"):
        norm_quantize(x, weight=weight, kind=RMS, form="int4")  # type: ignore[arg-type]
    with pytest.raises(
        KernelError, match=r"norm_quantize: x must be float32, bfloat16 or float16, but is torch\.float64"
    ):
        norm_quantize(x.double(), weight=weight, kind=RMS)
    with pytest.raises(KernelError, match="norm_quantize: residual must be float32, bfloat16 or float16"):
        norm_quantize(x, weight=weight, residual=x.double(), kind=RMS)
