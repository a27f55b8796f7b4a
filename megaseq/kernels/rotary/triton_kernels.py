"""The kernel of rotary positions. Names: T tokens of a row, N heads, H head, R turned width of a head."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def rotate_kernel(
    X,
    Y,
    COSINES,
    SINES,
    T,
    N,
    H,
    R,
    x_stride_b,
    x_stride_t,
    x_stride_n,
    c_stride_b,
    c_stride_t,
    s_stride_b,
    s_stride_t,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Turns HEADS heads of one token by its angles, or back; both of a pair have one angle. REST: 0 if R is H."""
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    in_heads = heads < N
    pair = tl.arange(0, PAIRS)
    in_pairs = pair < R // 2
    first = pair * 2 if INTERLEAVED else pair
    apart = 1 if INTERLEAVED else R // 2
    cosines = tl.load(COSINES + b * c_stride_b + t * c_stride_t + first, mask=in_pairs, other=1.0).to(tl.float32)
    sines = tl.load(SINES + b * s_stride_b + t * s_stride_t + first, mask=in_pairs, other=0.0).to(tl.float32)
    if INVERSE:
        sines = -sines
    inside = in_heads[:, None] & in_pairs[None, :]
    source = X + b * x_stride_b + t * x_stride_t + heads[:, None] * x_stride_n
    target = Y + (token * N + heads[:, None]) * H
    left = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + first[None, :] + apart, mask=inside, other=0.0).to(tl.float32)
    dtype = Y.dtype.element_ty
    tl.store(target + first[None, :], (left * cosines[None, :] - right * sines[None, :]).to(dtype), mask=inside)
    tl.store(target + first[None, :] + apart, (right * cosines[None, :] + left * sines[None, :]).to(dtype), mask=inside)
    if REST > 0:
        column = R + tl.arange(0, REST)
        inside = in_heads[:, None] & (column < H)[None, :]
        tl.store(target + column[None, :], tl.load(source + column[None, :], mask=inside, other=0.0), mask=inside)
