"""A kernel that only counts the tiles which attention's kernels would visit."""

from __future__ import annotations

from megaseq.kernels.attention.triton_parts import visible_tiles
from megaseq.kernels.triton_runtime import tl, triton


@triton.jit(do_not_specialize=["rows", "columns", "shift", "low", "high"])
def count_visits(OUT, RANGES, rows, columns, shift, low, high, BLOCK: tl.constexpr, GRANULE: tl.constexpr):
    tile = tl.program_id(0)
    begin, whole, whole_stop, stop = visible_tiles(
        RANGES, 0, tile * BLOCK, rows, columns, shift, low, high, BLOCK, BLOCK, GRANULE
    )
    tl.store(OUT + tile * 2, whole_stop - whole)
    tl.store(OUT + tile * 2 + 1, stop - begin - (whole_stop - whole))
