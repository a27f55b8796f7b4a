"""The calls of `quantize` that tests prove and benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.quantize.formats import FormatName


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
