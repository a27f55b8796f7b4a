"""Shapes of `scaled_linear` that are proven and timed on a GPU, beside torch's products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from megaseq.kernels.activation.reference import FUNCTIONS
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype, ready
from megaseq.kernels.quantize import dequantize
from megaseq.kernels.scaled_linear import scaled_linear
from megaseq.kernels.scaled_linear.cases import TOLERANCE, LinearCase
from megaseq.kernels.scaled_linear.choice import SCALES_ROWS_IN_HOST_MEMORY
from megaseq.kernels.scaled_linear.configs import configs, default
from megaseq.kernels.scaled_linear.reference import reference_scaled_linear
from megaseq.kernels.scaled_linear.torch_products import int_mm_linear, scaled_mm_linear
from megaseq.kernels.triton_runtime import Config

SHAPES = (
    *(
        LinearCase(f"{name}_{form}", rows=rows, width=width, columns=columns, form=form)
        for form in ("int8", "e4m3")
        for name, rows, width, columns in (
            ("t5_large_up_batch1", 1, 1024, 4096),
            ("t5_large_up_batch32", 32, 1024, 4096),
            ("t5_large_up_batch128", 128, 1024, 4096),
            ("t5_xl_head_batch1", 1, 2048, 32128),
            ("t5_xl_up_batch1024", 1024, 2048, 5120),
            ("t5_xl_up_16k_tokens", 16384, 2048, 5120),
        )
    ),
    LinearCase(
        "blocks_16k_tokens_e4m3", rows=16384, width=2048, columns=5120, form="e4m3", x_block=128, weight_block=128
    ),
    LinearCase("blocks_batch32_e4m3", rows=32, width=2048, columns=5120, form="e4m3", x_block=128, weight_block=128),
    LinearCase("bias_and_gelu_int8", rows=4096, width=1024, columns=4096, biased=True, activation="gelu"),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            op="scaled_linear",
            name=shape.name,
            check=functools.partial(_check, shape),
            prepare=functools.partial(_prepare, shape),
            candidates={"scaled_linear": _candidates(shape)},
        )
        for shape in SHAPES
    ]


def _candidates(shape: LinearCase) -> list[Config]:
    # What there is to try depends on the GPU; the list of cases can be made without one.
    integer, block = shape.form == "int8", shape.weight_block
    if torch.cuda.is_available():
        return configs(shape.rows, integer=integer, block=block)
    return [default(shape.rows, block=block)]


def _small(shape: LinearCase, *, on_gpu: bool = False) -> LinearCase:
    """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
    if on_gpu:
        return dataclasses.replace(shape, rows=min(shape.rows, 256))
    return dataclasses.replace(shape, rows=min(shape.rows, 40), width=256, columns=96)


def _check(shape: LinearCase, device: torch.device) -> Mapping[str, Comparison]:
    x, weight, bias = _small(shape, on_gpu=device.type == "cuda").tensors(device=device)
    dtype = proof_dtype(torch.bfloat16, device=device)
    y = scaled_linear(x, weight=weight, bias=bias, activation=shape.activation, dtype=dtype)
    expected = reference_scaled_linear(x, weight=weight, bias=bias, activation=shape.activation, dtype=torch.float64)
    return {"y": Comparison(y, expected, TOLERANCE[dtype])}


def _prepare(shape: LinearCase, device: torch.device) -> Timed:
    """Tensors of full size; on the host small ones."""
    shape = shape if device.type == "cuda" else _small(shape)
    x, weight, bias = shape.tensors(device=device)
    dtype = proof_dtype(torch.bfloat16, device=device)
    m, n, k = shape.rows, shape.columns, shape.width

    def plain() -> Callable[[], object]:
        rows, matrix = dequantize(x, dtype=dtype), dequantize(weight, dtype=dtype)
        added = None if bias is None else bias.to(dtype)
        finish = FUNCTIONS[shape.activation]
        return lambda: finish(functional.linear(rows, matrix, added))

    peers = {"bf16": plain}
    if x.scales.shape[1] == weight.scales.shape[1] == 1:
        if shape.form == "int8":
            peers["int_mm"] = ready(
                lambda: int_mm_linear(x, weight=weight, bias=bias, activation=shape.activation, dtype=dtype)
            )
        elif device.type == "cuda" or SCALES_ROWS_IN_HOST_MEMORY:
            peers["scaled_mm"] = ready(lambda: scaled_mm_linear(x, weight=weight, bias=None, dtype=dtype))
    return Timed(
        run=lambda: scaled_linear(x, weight=weight, bias=bias, activation=shape.activation, dtype=dtype),
        peers=peers,
        flops=2.0 * m * n * k if m >= 256 else 0.0,
        bytes=float(m * k + n * k + 2 * m * n),
    )
