"""What `megaseq bench kernels` proves and times of quantisation: activations before a matrix product."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.quantize import FormatName, quantize
from megaseq.kernels.quantize.configs import configs
from megaseq.kernels.quantize.reference import reference_quantize


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

    def small(self) -> Shape:
        """Sizes for a proof."""
        return dataclasses.replace(self, rows=9)


SHAPES = (
    Shape("int8_rows_t5_large", 16384, 1024, "int8"),
    Shape("int8_rows_t5_large_hidden", 16384, 2816, "int8"),
    Shape("e4m3_rows_t5_large", 16384, 1024, "e4m3"),
    Shape("e4m3_blocks_of_128", 16384, 2816, "e4m3", block=128),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "quantize",
            shape.name,
            check=functools.partial(compare, shape.small()),
            prepare=functools.partial(prepare, shape),
            candidates={"quantize": configs(shape.block or shape.width)},
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Values and scales beside the reference: the same bits, where the type of the check has all of them."""
    x = shape.rows_on(device)
    found = quantize(x, form=shape.form, block=shape.block)
    values, scales = reference_quantize(x, form=shape.form, block=shape.block or shape.width, power_of_two=False)
    # Triton's interpreter rounds to e4m3 by rules of its own.
    exact = device.type == "cuda" or shape.form == "int8"
    return {
        "values": Comparison(found.values.float(), values.float(), 0.0 if exact else 0.1),
        "scales": Comparison(found.scales, scales, 0.0),
    }


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Rows of full size; on the host a few."""
    shape = shape if device.type == "cuda" else shape.small()
    x, block = shape.rows_on(device), shape.block or shape.width
    plain = functools.partial(reference_quantize, form=shape.form, block=block, power_of_two=False)
    compiled = torch.compile(plain, dynamic=False) if device.type == "cuda" else plain
    moved = x.numel() * (x.element_size() + 1) + 4 * x.numel() // block
    run = functools.partial(quantize, x, form=shape.form, block=shape.block)
    peers = {"torch": functools.partial(plain, x), "torch_compiled": functools.partial(compiled, x)}
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85, "torch_compiled": 1.0})
