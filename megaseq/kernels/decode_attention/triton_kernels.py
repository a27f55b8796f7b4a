# mypy: ignore-errors
"""Triton: attention of a few queries to a cache, in shares of its length, and the sum of the shares.

Legend: B sources, K hypotheses, N query heads, M key heads, H width of a head, G = N / M, X pages of C places.
"""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def _as_numbers(entries, dtype: tl.constexpr, E4M3_BITS: tl.constexpr):
    """Entries of the cache as `dtype`; E4M3_BITS: they are the bits of e4m3, for GPUs that cannot convert it."""
    if E4M3_BITS:
        bits = entries.to(tl.int32)
        magnitude = bits & 0x7F
        # The same bits in fp16 are the number times 2 ** -8, subnormal ones also.
        half = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0).to(dtype)
    elif entries.dtype == dtype:
        return entries
    else:
        return entries.to(tl.float32).to(dtype)


@triton.jit
def _scores(
    q, k, j, ends, seen, key_scale, at_scale, at_head_scale, read, bias, query_head, columns, bias_n, bias_d, scale,
    soft_cap, BIAS: tl.constexpr, SOFT_CAP: tl.constexpr, SCALES: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, BLOCK_N] of q [ROWS, WIDTH] and k [BLOCK_N, WIDTH] at places j; -inf where not seen."""
    if MATRIX:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    else:
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :] * scale
    if SCALES == 1:
        scores = scores * tl.load(key_scale + at_head_scale)
    if SCALES == 2:
        scores = scores * tl.load(key_scale + at_scale, mask=read, other=0.0)[None, :]
    if SOFT_CAP:
        # tanh by way of the sigmoid, which does not overflow.
        scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)
    if BIAS:
        column = tl.minimum(tl.maximum(columns - ends[:, None] + j[None, :], 0), columns - 1)
        at_bias = bias + query_head.to(tl.int64)[:, None] * bias_n + column * bias_d
        scores += tl.load(at_bias, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "window", "num_hyps", "group", "num_heads", "page", "capacity", "columns", "row_tiles", "table_b", "table_k",
        "length_b", "length_k", "bias_n",
    ]
)  # fmt: skip
def attend_share(
    query, key, value, table, lengths, bias, key_scale, value_scale, output, log_sums,
    scale, soft_cap, window, num_hyps, group, num_heads, width, page, capacity, columns, row_tiles,
    query_b, query_k, query_n, query_h, key_x, key_c, key_m, key_h, value_x, value_c, value_m, value_h,
    table_b, table_k, table_w, length_b, length_k, bias_n, bias_d, scale_x, scale_c, scale_m,
    OWN: tl.constexpr, TABLE: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr, SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr, SCALES: tl.constexpr, E4M3_BITS: tl.constexpr, SPLIT: tl.constexpr, MATRIX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of queries that read the same keys, and one share of those.

    Queries of a tile are K * G rows (OWN: G), hypotheses first. SPLIT writes sums and their log-sum-exp for
    `add_shares`; otherwise there is one share, and the output is whole. SCALES: 0 none, 1 for each head, 2 for each
    token. MATRIX multiplies by tl.dot; otherwise there is one row.
    """
    program = tl.program_id(0)
    share = tl.program_id(1)
    row_tile = program % row_tiles
    head = (program // row_tiles) % num_heads
    source = program // row_tiles // num_heads
    first_hyp = 0
    hyps = num_hyps
    if OWN:
        first_hyp = source % num_hyps
        source = source // num_hyps
        hyps = 1
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < hyps * group
    hyp = first_hyp + row // group
    query_head = head * group + row % group
    b = source.to(tl.int64)
    m = head.to(tl.int64)

    ends = tl.where(live, capacity, 0)
    if LENGTHS:
        ends = tl.load(lengths + b * length_b + hyp * length_k, mask=live, other=0).to(tl.int32)
        ends = tl.minimum(tl.maximum(ends, 0), capacity)
    end = tl.max(ends, 0)
    start = end * 0
    starts = ends * 0
    if WINDOW:
        starts = tl.maximum(ends - window, 0)
        start = tl.min(tl.where(live, starts, end), 0)
    blocks = (end - start + BLOCK_N - 1) // BLOCK_N
    per_share = (blocks + tl.num_programs(1) - 1) // tl.num_programs(1)
    first_block = share * per_share

    dtype = query.dtype.element_ty
    w = tl.arange(0, WIDTH)
    inside = (w < width)[None, :]
    at_query = query + b * query_b + hyp.to(tl.int64)[:, None] * query_k + query_head[:, None] * query_n
    q = tl.load(at_query + w[None, :] * query_h, mask=live[:, None] & inside, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in range(first_block, tl.minimum(first_block + per_share, blocks)):
        j = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
        read = j < end
        if TABLE:
            x = tl.load(table + b * table_b + first_hyp * table_k + (j // page) * table_w, mask=read, other=0)
            x = x.to(tl.int64)
            c = (j % page).to(tl.int64)
        else:
            x = tl.zeros((BLOCK_N,), tl.int64) + b
            c = j.to(tl.int64)
        at_key = (x * key_x + c * key_c + m * key_m)[:, None] + w[None, :] * key_h
        k = _as_numbers(tl.load(key + at_key, mask=read[:, None] & inside, other=0.0), dtype, E4M3_BITS)
        at_scale = x * scale_x + c * scale_c + m * scale_m
        seen = live[:, None] & (j[None, :] < ends[:, None]) & (j[None, :] >= starts[:, None])
        scores = _scores(
            q, k, j, ends, seen, key_scale, at_scale, m * scale_m, read, bias, query_head, columns, bias_n, bias_d,
            scale, soft_cap, BIAS, SOFT_CAP, SCALES, MATRIX,
        )  # fmt: skip

        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
        at_value = (x * value_x + c * value_c + m * value_m)[:, None] + w[None, :] * value_h
        v = _as_numbers(tl.load(value + at_value, mask=read[:, None] & inside, other=0.0), dtype, E4M3_BITS)
        if SCALES == 2:
            weights = weights * tl.load(value_scale + at_scale, mask=read, other=0.0)[None, :]
        if MATRIX:
            sums = tl.dot(weights.to(dtype), v, sums * shrink[:, None], input_precision="ieee")
        else:
            sums = sums * shrink[:, None] + tl.sum(tl.trans(weights) * v.to(tl.float32), 0)[None, :]

    if SCALES == 1:
        sums = sums * tl.load(value_scale + m * scale_m)
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (b * num_hyps + hyp) * (num_heads * group) + query_head
    if SPLIT:
        place += share.to(tl.int64) * (tl.num_programs(0) // row_tiles) * (hyps * group)
        log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
        tl.store(log_sums + place, log_sum, mask=live)
    tl.store(
        output + place[:, None] * width + w[None, :], sums.to(output.dtype.element_ty), mask=live[:, None] & inside
    )


@triton.jit(do_not_specialize=["num_shares", "rows"])
def add_shares(
    shares, log_sums, output, num_shares, rows, width, BLOCK_S: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The output [rows, H] of one row from its fp32 shares [shares, rows, H] and their log-sum-exp [shares, rows]."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, WIDTH)
    inside = w < width
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, num_shares, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        there = s < num_shares
        place = s.to(tl.int64) * rows + row
        log_sum = tl.load(log_sums + place, mask=there, other=float("-inf"))
        part = tl.load(shares + place[:, None] * width + w[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(log_sum, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(log_sum - safe)
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(part * weights[:, None], 0)
        top = higher
    sums = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * width + w, sums.to(output.dtype.element_ty), mask=inside)
