"""What `megaseq bench kernels` proves and times of quantisation: activations before a matrix product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype, ready
from megaseq.kernels.quantize import FormatName, Quantized, dequantize, quantize
from megaseq.kernels.quantize.configs import configs, dequantize_configs
from megaseq.kernels.quantize.reference import reference_dequantize, reference_quantize


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of an activation."""

    name: str
    rows: int
    width: int
    form: FormatName
    block: int | None = None

    def rows_on(self, device: torch.device) -> Tensor:
        """[R, D]."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        return normal(self.rows, self.width, device=device, dtype=dtype, trained=False)

    def quantized(self, device: torch.device) -> Quantized:
        """The rows in 8 bits, by the reference."""
        block = self.block or self.width
        values, scales = reference_quantize(self.rows_on(device), form=self.form, block=block, power_of_two=False)
        return Quantized(values, scales, block)

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        return dataclasses.replace(self, rows=64 if on_gpu else 9)


SHAPES = (
    Shape("int8_rows_t5_large", 16384, 1024, "int8"),
    Shape("int8_rows_t5_large_hidden", 16384, 2816, "int8"),
    Shape("e4m3_rows_t5_large", 16384, 1024, "e4m3"),
    Shape("e4m3_blocks_of_128", 16384, 2816, "e4m3", block=128),
)


def bench_cases() -> list[BenchCase]:
    """All shapes, into 8 bits and some of them back."""
    return [
        BenchCase(
            "quantize",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"quantize": configs(shape.block or shape.width)},
        )
        for shape in SHAPES
    ] + [
        BenchCase(
            "quantize",
            f"{shape.name}_back",
            check=functools.partial(compare_back, shape),
            prepare=functools.partial(prepare_back, shape),
            candidates={"dequantize": dequantize_configs()},
        )
        for shape in (SHAPES[0], SHAPES[3])
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Values and scales beside the reference: the same bits."""
    shape = shape.small(on_gpu=device.type == "cuda")
    x = shape.rows_on(device)
    found = quantize(x, form=shape.form, block=shape.block)
    values, scales = reference_quantize(x, form=shape.form, block=shape.block or shape.width, power_of_two=False)
    mine, expected = found.values.float(), values.float()
    if device.type != "cuda" and shape.form == "e4m3":
        # Where 4 bits of mantissa are rounded up to the next power of two Triton's interpreter loses the carry, and it
        # rounds what lies below the normal numbers otherwise.
        block = shape.block or shape.width
        scaled = x.float() / scales.repeat_interleave(block, dim=-1)[:, : shape.width]
        lost = (scaled.abs().frexp().mantissa >= 31 / 32) | (scaled.abs() < 2**-6)
        mine = torch.where(lost, expected, mine)
    return {"values": Comparison(mine, expected, 0.0), "scales": Comparison(found.scales, scales, 0.0)}


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Rows of full size; on the host a few."""
    shape = shape if device.type == "cuda" else shape.small()
    x, block = shape.rows_on(device), shape.block or shape.width
    plain = functools.partial(reference_quantize, form=shape.form, block=block, power_of_two=False)

    def compiled() -> Callable[[], object]:
        return functools.partial(torch.compile(plain, dynamic=False) if device.type == "cuda" else plain, x)

    moved = x.numel() * (x.element_size() + 1) + 4 * x.numel() // block
    run = functools.partial(quantize, x, form=shape.form, block=shape.block)
    peers = {"torch": ready(functools.partial(plain, x)), "torch_compiled": compiled}
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85, "torch_compiled": 1.0})


def compare_back(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Numbers beside the reference: the same bits."""
    quantized = shape.small(on_gpu=device.type == "cuda").quantized(device)
    values, scales, block = quantized
    dtype = proof_dtype(torch.bfloat16, device=device)
    found = dequantize(quantized, dtype=dtype)
    expected = reference_dequantize(values, scales=scales, block=block, dtype=dtype)
    return {"numbers": Comparison(found, expected, 0.0)}


def prepare_back(shape: Shape, device: torch.device) -> Timed:
    """Rows of full size; on the host a few."""
    quantized = (shape if device.type == "cuda" else shape.small()).quantized(device)
    values, scales, block = quantized
    dtype = proof_dtype(torch.bfloat16, device=device)
    plain = functools.partial(reference_dequantize, values, scales=scales, block=block, dtype=dtype)
    moved = values.numel() * (1 + dtype.itemsize) + 4 * scales.numel()
    run = functools.partial(dequantize, quantized, dtype=dtype)
    return Timed(run, peers={"torch": ready(plain)}, bytes=moved, goals={"ceiling": 0.85})
