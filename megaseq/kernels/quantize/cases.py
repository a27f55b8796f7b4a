"""The calls of `quantize` that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.quantize.configs import configs, dequantize_configs
from megaseq.kernels.quantize.formats import FORMATS, FormatName
from megaseq.kernels.triton_runtime import override


@dataclass(frozen=True)
class QuantizeCase:
    """Sizes and kind of one call."""

    name: str
    rows: int = 5
    width: int = 200
    block: int | None = None
    form: FormatName = "int8"
    power_of_two: bool = False

    def tensor(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Rows [R, D] of very different magnitudes; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.rows, self.width, generator=generator, dtype=torch.float64)
        rows = rows * torch.logspace(-4, 3, self.rows, dtype=torch.float64)[:, None]
        return rows.to(dtype)


CASES = (
    QuantizeCase("row"),
    QuantizeCase("row_e4m3", form="e4m3"),
    QuantizeCase("row_power_of_two", power_of_two=True),
    QuantizeCase("row_power_of_two_e4m3", form="e4m3", power_of_two=True),
    QuantizeCase("blocks", width=300, block=128),
    QuantizeCase("blocks_e4m3", width=300, block=128, form="e4m3"),
    QuantizeCase("blocks_that_tiles_do_not_divide", rows=33, width=130, block=48, form="e4m3", power_of_two=True),
    QuantizeCase("one_row", rows=1, width=64),
    QuantizeCase("one_element", rows=1, width=1, form="e4m3"),
    QuantizeCase("no_rows", rows=0, width=7),
)


def compile_cases() -> list[CompileCase]:
    """Every kernel and format; all tiles in bf16."""
    return [
        CompileCase(
            name=f"{form}_{str(dtype).removeprefix('torch.')}_{block}",
            run=functools.partial(_compile, form=form, dtype=dtype, block=block),
            minimum_architecture=89 if form == "e4m3" else 80,
        )
        for form in FORMATS
        for dtype, block in (
            (torch.bfloat16, 128),
            (torch.bfloat16, 4096),
            (torch.bfloat16, 16384),
            (torch.float32, 1024),
        )
    ]


def _compile(*, form: str, dtype: torch.dtype, block: int) -> None:
    from megaseq.kernels.quantize.op import empty_outputs, launch_dequantize, launch_quantize

    x = torch.empty(2, 2 * block, dtype=dtype)
    values, scales = empty_outputs(x, form=form, block=block)
    tiles = configs(block)
    for tile in tiles if dtype is torch.bfloat16 else tiles[:1]:
        with override(quantize=tile):
            launch_quantize(x, out=values, scales=scales, form=form, block=block, power_of_two=False)
    launch_quantize(x, out=values, scales=scales, form=form, block=block, power_of_two=True)
    launch_quantize(x, out=x, scales=None, form=form, block=block, power_of_two=False)
    for tile in dequantize_configs() if block == 128 else dequantize_configs()[:1]:
        with override(dequantize=tile):
            launch_dequantize(values, scales=scales, block=block, out=x)
