"""What `megaseq bench kernels` proves of quantisation on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools

import torch

from megaseq.kernels.bench.passes import short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.quantize import Quantized, dequantize, fake_quantize, quantize
from megaseq.kernels.quantize.cases import CASES, QuantizeCase
from megaseq.kernels.quantize.reference import reference_dequantize, reference_quantize


def proof_cases() -> list[BenchCase]:
    """All calls."""
    return [
        BenchCase("quantize", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case in CASES
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]


def compare(case: QuantizeCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Into 8 bits, back, and both at once: the bits of the reference."""
    x, block = case.tensor(dtype=dtype).to(device), case.block or case.width
    values, scales = reference_quantize(x, form=case.form, block=block, power_of_two=case.power_of_two)
    back = reference_dequantize(values, scales=scales, block=block, dtype=dtype)
    found = quantize(x, form=case.form, block=case.block, power_of_two=case.power_of_two)
    fake = fake_quantize(x, form=case.form, block=case.block, power_of_two=case.power_of_two)
    pairs = {
        "values": (found.values.float(), values.float()),
        "scales": (found.scales, scales),
        "numbers": (dequantize(Quantized(values, scales, block), dtype=dtype), back),
        "fake": (fake, back),
    }
    return {name: Comparison(*pair, 0.0) for name, pair in pairs.items()}
