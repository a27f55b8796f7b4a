"""What `megaseq bench kernels` proves of the norms on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import compare_passes, in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.norm import add_norm, norm, norm_quantize
from megaseq.kernels.norm.cases import CASES, LAYER, RMS, TOLERANCE, NormCase
from megaseq.kernels.norm.reference import reference_norm
from megaseq.kernels.quantize import FormatName, dequantize
from megaseq.kernels.quantize.formats import FORMATS

IN_OTHER_TYPES = ("rms", "layer", "rms_bias_strided")
"""Names of cases that are proven in float32 and float16 too."""
FORMS: tuple[FormatName, ...] = ("int8", "e4m3")
QUANTISED = (
    NormCase("quantised_layer", shape=(5, 9, 130), kind=LAYER, biased=True, strided=True),
    NormCase("quantised_rms", shape=(33, 1024), kind=RMS),
)


def proof_cases() -> list[BenchCase]:
    """All calls with and without a sum before; quantised ones, in both formats."""
    found = [
        BenchCase(
            "norm",
            f"{case.name}{'_add' * summed}_{short(dtype)}",
            functools.partial(compare, case, dtype=dtype, summed=summed),
        )
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES)
        for summed in (False, True)
    ]
    quantised = [
        BenchCase(
            "norm",
            f"{case.name}{'_add' * summed}_{form}",
            functools.partial(compare_quantised, case, form=form, summed=summed),
        )
        for case in QUANTISED
        for form in FORMS
        for summed in (False, True)
    ]
    return [*found, *quantised]


def compare(case: NormCase, device: torch.device, *, dtype: torch.dtype, summed: bool) -> dict[str, Comparison]:
    """Results and gradients beside those of the reference in float64."""
    tensors = case.tensors(dtype=dtype, device=device.type)
    if not summed:
        del tensors["residual"]
    inputs = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def ours(given: Sequence[Tensor]) -> list[Tensor]:
        named = dict(zip(inputs, given, strict=True))
        x, weight, bias = named["x"], named["weight"], named.get("bias")
        if summed:
            return list(add_norm(x, residual=named["residual"], weight=weight, bias=bias, kind=case.kind))
        return [norm(x, weight=weight, bias=bias, kind=case.kind)]

    def theirs(given: Sequence[Tensor]) -> list[Tensor]:
        named = dict(zip(inputs, given, strict=True))
        x, weight, bias = named["x"], named["weight"], named.get("bias")
        total = named["residual"] + x if summed else x
        if summed:
            # What is normalised is the sum as it was rounded.
            total = total + (total.detach().to(dtype).double() - total.detach())
        y = reference_norm(total, weight=weight, bias=bias, kind=case.kind)
        return [y, total] if summed else [y]

    return compare_passes(ours, reference=theirs, inputs=list(inputs.values()), tolerance=TOLERANCE[dtype])


def compare_quantised(case: NormCase, device: torch.device, *, form: FormatName, summed: bool) -> dict[str, Comparison]:
    """Numbers and scales beside the reference in float64: off by no more than a step of the format."""
    tensors = case.tensors(dtype=torch.bfloat16, device=device.type)
    x, residual, weight, bias = (None if tensor is None else tensor.detach() for tensor in tensors.values())
    assert x is not None and residual is not None and weight is not None
    found = norm_quantize(x, weight=weight, bias=bias, residual=residual if summed else None, kind=case.kind, form=form)
    total = residual + x if summed else x
    exact = None if bias is None else bias.double()
    y = reference_norm(total.double(), weight=weight.double(), bias=exact, kind=case.kind)
    scales = y.abs().amax(dim=-1, keepdim=True) / FORMATS[form].largest
    # Half a step, of the largest number of a row: 2^-4 of it in e4m3, which has 3 bits of mantissa.
    half_step = (0.51 if form == "int8" else 16.5) * scales
    off = (dequantize(found.quantized).double() - y).abs() / half_step
    comparisons = {
        "scales": Comparison(found.quantized.scales, scales, 1e-5),
        "half steps": Comparison(off.clamp(min=1.0), torch.ones_like(off), 0.0),
    }
    if found.total is not None:
        comparisons["total"] = Comparison(found.total, total, 0.0)
    return comparisons
