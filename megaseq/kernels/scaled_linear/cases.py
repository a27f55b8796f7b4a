"""The calls of `scaled_linear` that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.quantize import Quantized, quantize
from megaseq.kernels.quantize.formats import FORMATS, FormatName
from megaseq.kernels.scaled_linear.configs import configs
from megaseq.kernels.triton_runtime import override, version


@dataclass(frozen=True)
class LinearCase:
    """Sizes and kind of one call."""

    name: str
    rows: int = 5
    width: int = 64
    columns: int = 48
    form: FormatName = "int8"
    x_block: int | None = None
    weight_block: int | None = None
    biased: bool = False
    activation: str = "identity"

    def tensors(self, *, device: torch.device, seed: int = 0) -> tuple[Quantized, Quantized, Tensor | None]:
        """x [M, K], weight [N, K] and bias [N]; rows have very different magnitudes."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.width, generator=generator)
        weight = torch.randn(self.columns, self.width, generator=generator) / self.width**0.5
        x = x * torch.logspace(-1, 1, self.rows)[:, None]
        bias = torch.randn(self.columns, generator=generator).to(device) if self.biased else None
        return (
            quantize(x.to(device), form=self.form, block=self.x_block),
            quantize(weight.to(device), form=self.form, block=self.weight_block),
            bias,
        )


def _both(name: str, **settings: int | bool | str | None) -> tuple[LinearCase, ...]:
    return tuple(LinearCase(f"{name}_{form}", form=form, **settings) for form in FORMATS)  # type: ignore[arg-type]


CASES = (
    *_both("plain"),
    *_both("one_row", rows=1, biased=True),
    *_both("one_of_all", rows=1, width=1, columns=1),
    *_both("ragged", rows=70, width=203, columns=130, biased=True, activation="gelu"),
    *_both("blocks_of_weight", rows=17, width=300, columns=40, weight_block=128, biased=True, activation="silu"),
    *_both("blocks_of_both", rows=3, width=160, columns=70, x_block=64, weight_block=64),
    LinearCase("blocks_of_two_sizes", form="e4m3", width=256, x_block=32, weight_block=128),
    LinearCase("many_rows", rows=150, width=128, columns=20),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest difference from the reference, in units of the largest magnitude."""
SPILLS = 256
"""Bytes that the widest tiles may store for want of registers, once, in the epilogue."""


def compile_cases() -> list[CompileCase]:
    """Every tile in either format, with and without scales of blocks; the first of each size for odd K too."""
    cases = []
    for form in FORMATS:
        for blocked in (False, True):
            for rows in (16, 32, 64, 128, 256):
                for odd in (False, True):
                    wide = form == "int8" and rows == 256 and not blocked
                    name = f"{form}_rows{rows}{'_blocked' if blocked else ''}{'_odd' if odd else ''}"
                    cases.append(
                        CompileCase(
                            name=name,
                            run=functools.partial(_compile, form=form, blocked=blocked, rows=rows, odd=odd),
                            tensor_cores=("scaled_linear_kernel",) if rows >= 64 else (),
                            # Triton 3.6 multiplies int8 on sm_100 by the instructions of sm_80.
                            tensor_cores_unknown_on=(100,) if form == "int8" and version() < (3, 9) else (),
                            spill_bytes=SPILLS if wide and not odd else 0,
                            minimum_architecture=89 if form == "e4m3" else 80,
                        )
                    )
    return cases


def _compile(*, form: str, blocked: bool, rows: int, odd: bool) -> None:
    from megaseq.kernels.scaled_linear.op import launch

    width, columns, block = 512, 256, 128 if blocked else 512
    dtype = FORMATS[form].dtype
    x, weight = (
        Quantized(torch.empty(count, width, dtype=dtype), torch.empty(count, width // block), block)
        for count in (rows, columns)
    )
    bias, out = torch.empty(columns, dtype=torch.bfloat16), torch.empty(rows, columns, dtype=torch.bfloat16)
    tiles = configs(rows, integer=form == "int8", block=block if blocked else None)
    if odd:
        x, weight = (Quantized(one.values[:, :-3], one.scales, block) for one in (x, weight))
        tiles = tiles[:1]
    for tile in tiles:
        with override(scaled_linear=tile):
            # The activation that takes most registers.
            launch(x, weight=weight, bias=bias, activation="gelu", out=out)
