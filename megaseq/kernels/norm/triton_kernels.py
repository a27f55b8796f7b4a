"""Kernels of the norms. Names: R rows, D columns, `s` what is normalised (x or x + residual), `rstd` 1 / deviation.

A program takes tiles of ROWS whole rows. In the backward pass a fixed number of programs share the rows, each sums the
gradient of the weights over its own, and torch adds these sums: the same bits in every run.
"""

from __future__ import annotations

from megaseq.kernels.quantize.triton_kernels import magnitudes, rounded, scale_of
from megaseq.kernels.triton_math import row_offsets
from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def _load_rows(POINTER, rows, in_rows, columns, D, inner, outer_stride, inner_stride):
    """A tile, zero outside."""
    places = row_offsets(rows, inner, outer_stride, inner_stride)
    inside = in_rows[:, None] & (columns < D)[None, :]
    return tl.load(POINTER + places[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _load_weight(WEIGHT, columns, D, ADD_ONE: tl.constexpr):
    weight = tl.load(WEIGHT + columns, mask=columns < D, other=0.0).to(tl.float32)
    if ADD_ONE:
        weight = weight + 1.0
    return weight


@triton.jit
def norm_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    BIAS,
    Y,
    TOTAL,
    MEAN,
    RSTD,
    SCALES,
    R,
    D,
    eps,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    r_inner,
    r_outer_stride,
    r_inner_stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    CENTRED: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores y, with HAS_RESIDUAL also s, with HAS_STATISTICS what the backward pass needs, QUANTIZED in 8 bits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < R
    columns = tl.arange(0, COLUMNS)
    in_columns = (columns < D)[None, :]
    inside = in_rows[:, None] & in_columns
    s = _load_rows(X, rows, in_rows, columns, D, x_inner, x_outer_stride, x_inner_stride).to(tl.float32)
    if HAS_RESIDUAL:
        s += _load_rows(RESIDUAL, rows, in_rows, columns, D, r_inner, r_outer_stride, r_inner_stride).to(tl.float32)
        # The sum that is stored is the one that is normalised.
        s = s.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + rows[:, None] * D + columns[None, :], s, mask=inside)
        s = s.to(tl.float32)
    if CENTRED:
        mean = tl.sum(s, 1) / D
        s = tl.where(in_columns, s - mean[:, None], 0.0)
        if HAS_STATISTICS:
            tl.store(MEAN + rows, mean, mask=in_rows)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
    if HAS_STATISTICS:
        tl.store(RSTD + rows, rstd, mask=in_rows)
    y = s * rstd[:, None] * _load_weight(WEIGHT, columns, D, ADD_ONE)[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if QUANTIZED:
        top = magnitudes(y)
        finite = top < float("inf")
        scale = scale_of(top, LARGEST, SMALLEST, False)
        y = rounded(y, tl.div_rn(1.0, scale), finite, LARGEST, INTEGER)
        tl.store(SCALES + rows, tl.where(finite, scale, float("nan")), mask=in_rows)
    tl.store(Y + rows[:, None] * D + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    DY,
    DTOTAL,
    S,
    WEIGHT,
    MEAN,
    RSTD,
    DS,
    DWEIGHT,
    DBIAS,
    R,
    D,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    t_inner,
    t_outer_stride,
    t_inner_stride,
    s_inner,
    s_outer_stride,
    s_inner_stride,
    CENTRED: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores the gradient of s, and this program's part of those of weight and bias, [programs, D] in float32."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    in_columns = (columns < D)[None, :]
    weight = _load_weight(WEIGHT, columns, D, ADD_ONE)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(program * ROWS, R, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        in_rows = rows < R
        inside = in_rows[:, None] & in_columns
        normed = _load_rows(S, rows, in_rows, columns, D, s_inner, s_outer_stride, s_inner_stride).to(tl.float32)
        dy = _load_rows(DY, rows, in_rows, columns, D, y_inner, y_outer_stride, y_inner_stride).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=in_rows, other=0.0)
        if CENTRED:
            mean = tl.load(MEAN + rows, mask=in_rows, other=0.0)
            normed = tl.where(in_columns, normed - mean[:, None], 0.0)
        normed *= rstd[:, None]
        if HAS_DWEIGHT:
            dweight += dy * normed
        if HAS_DBIAS:
            dbias += dy
        dy *= weight[None, :]
        ds = dy - normed * (tl.sum(dy * normed, 1) / D)[:, None]
        if CENTRED:
            ds -= (tl.sum(dy, 1) / D)[:, None]
        ds *= rstd[:, None]
        if HAS_TOTAL:
            ds += _load_rows(DTOTAL, rows, in_rows, columns, D, t_inner, t_outer_stride, t_inner_stride).to(tl.float32)
        tl.store(DS + rows[:, None] * D + columns[None, :], ds.to(DS.dtype.element_ty), mask=inside)
    place = program.to(tl.int64) * D + columns
    if HAS_DWEIGHT:
        tl.store(DWEIGHT + place, tl.sum(dweight, 0), mask=columns < D)
    if HAS_DBIAS:
        tl.store(DBIAS + place, tl.sum(dbias, 0), mask=columns < D)
