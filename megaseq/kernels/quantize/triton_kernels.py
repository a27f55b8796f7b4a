"""Kernels of `quantize`. Names: R rows, D columns, `top` largest magnitude, `y` what is stored.

A program takes ROWS rows of one block of columns. Where a block is wider than COLUMNS it is read twice, the second time
mostly from cache. Products must not be fused with the sums that follow (the launch says so): the result is then that of
the reference, bit by bit.
"""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def magnitudes(x):
    """Largest magnitude of each row of a tile; infinite if a NaN is among them, which a maximum would drop."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)


@triton.jit
def scale_of(top, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, POWER: tl.constexpr):
    """The scales of blocks with these largest magnitudes."""
    scale = tl.maximum(tl.div_rn(top, LARGEST), SMALLEST)
    if POWER:
        bits = (scale.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(top == 0.0, 1.0, scale)


@triton.jit
def rounded(x, inverse, finite, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """The tile in units of its scales, on the grid of the format where that is the integers."""
    scaled = tl.minimum(tl.maximum(x * inverse[:, None], -LARGEST), LARGEST)
    if INTEGER:
        # At this magnitude the distance of neighbouring fp32 numbers is 1: the sum rounds to nearest even.
        scaled = (scaled + 12582912.0) - 12582912.0
    return tl.where(finite[:, None], scaled, 0.0)


@triton.jit
def quantize_kernel(
    x_ptr,
    y_ptr,
    scales_ptr,
    R,
    D,
    block,
    num_blocks,
    stride_r,
    stride_c,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    POWER: tl.constexpr,
    INTEGER: tl.constexpr,
    FAKE: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores values and scales; with FAKE instead of both the values times their scales. SINGLE: block <= COLUMNS."""
    number = tl.program_id(0) % num_blocks
    first = number * block
    end = tl.minimum(first + block, D)
    rows = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < R
    top = tl.zeros((ROWS,), tl.float32)
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = in_rows[:, None] & (columns < end)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=inside, other=0.0).to(
            tl.float32
        )
        top = tl.maximum(top, magnitudes(x))
    finite = top < float("inf")
    scale = scale_of(top, LARGEST, SMALLEST, POWER)
    inverse = tl.div_rn(1.0, scale)
    if not FAKE:
        tl.store(scales_ptr + rows * num_blocks + number, tl.where(finite, scale, float("nan")), mask=in_rows)
    for start in range(first, end, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = in_rows[:, None] & (columns < end)[None, :]
        if not SINGLE:
            x = tl.load(x_ptr + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=inside, other=0.0).to(
                tl.float32
            )
        y = rounded(x, inverse, finite, LARGEST, INTEGER)
        if FAKE:
            if not INTEGER:
                y = y.to(tl.float8e4nv).to(tl.float32)
            y = tl.where(finite[:, None], y * scale[:, None], float("nan"))
        tl.store(y_ptr + rows[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    values_ptr,
    scales_ptr,
    y_ptr,
    R,
    D,
    block,
    num_tiles,
    stride_r,
    stride_c,
    scales_stride_r,
    scales_stride_c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores values times the scales of their blocks; a program takes ROWS x COLUMNS of any blocks."""
    rows = (tl.program_id(0) // num_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = ((tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    values = tl.load(values_ptr + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=inside, other=0.0)
    scales = tl.load(
        scales_ptr + rows[:, None] * scales_stride_r + (columns // block)[None, :] * scales_stride_c,
        mask=inside,
        other=1.0,
    )
    y = values.to(tl.float32) * scales
    tl.store(y_ptr + rows[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
