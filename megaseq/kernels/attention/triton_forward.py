"""The forward kernel of attention: a tile of queries against the tiles of keys that it sees.

Dao 2023, "FlashAttention-2"; the softmax is put together as tiles come (Milakov and Gimelshein 2018). Three loops:
whole tiles far off, where a table's bias is one number; whole tiles near; and tiles of which some pairs do not see each
other.
"""

from __future__ import annotations

from megaseq.kernels.attention.triton_parts import (
    LN_2,
    TABLE_PAD,
    biases_of,
    dropout_rows,
    kept_of,
    load_tile,
    near_tiles,
    scores_of,
    sees,
    visible_tiles,
)
from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def _update(
    total, top, weight, tile, far_bias, q, K, V, KEY_IDS, TABLE, query_ids, slope, word, limit, here, beyond, threshold,
    start, m, column, k_ss, v_ss, S, shift, low, high, first, width, scale, cap,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_IDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr,
    WRAPS: tl.constexpr, NEAR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the sums of a tile of queries."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(K + tile.to(tl.int64) * BLOCK_N * k_ss, n, S, column, HEAD, BLOCK_D, WHOLE)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    # Where the score is the product times a number, plus a number: one multiply-add for each weight.
    LINEAR: tl.constexpr = not (HAS_CAP or HAS_SLOPES or NEAR)
    if LINEAR:
        x = qk
    else:
        biases, extra = None, far_bias
        if NEAR:
            biases, extra = biases_of(TABLE, tile * BLOCK_N - start, first, width, BLOCK_M, BLOCK_N, False), None
        x, _ = scores_of(qk, m[:, None], n[None, :], extra, biases, slope, shift, scale, cap, HAS_CAP, HAS_SLOPES)
    if not WHOLE:
        key_ids = 0
        if HAS_IDS:
            key_ids = tl.load(KEY_IDS + n, mask=n < S, other=0)[None, :]
        allowed = sees(m[:, None], n[None, :], query_ids, key_ids, shift, low, high, S, HAS_IDS, LOW, HIGH)
        x = tl.where(allowed, x, float("-inf"))
    highest = tl.max(x, 1)
    if LINEAR:
        highest = highest * scale + far_bias
    highest = tl.maximum(top, highest)
    shown = highest
    if not WHOLE:
        # A query that has seen nothing yet: any finite number does, as all its weights are zero.
        shown = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(x * scale - (shown - far_bias)[:, None]) if LINEAR else tl.exp2(x - shown[:, None])
    shrink = tl.exp2(top - shown)
    weight = weight * shrink + tl.sum(p, 1)
    if DROP:
        p = tl.where(
            kept_of(word[:, None], limit[:, None], here[:, None], beyond[:, None], n[None, :], threshold, WRAPS), p, 0.0
        )
    v = load_tile(V + tile.to(tl.int64) * BLOCK_N * v_ss, n, S, column, HEAD, BLOCK_D, WHOLE)
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, highest, weight


@triton.jit(
    do_not_specialize=["T", "S", "shift", "low", "high", "first", "width", "key", "offset", "run_rows", "threshold"]
)
def attention_forward(
    Q, K, V, OUTPUT, LOG_SUM, QUERY_IDS, KEY_IDS, RANGES, TABLE, SLOPES, RUNS,
    q_sb, q_st, q_sn, k_sb, k_ss, k_sn, v_sb, v_ss, v_sn,
    T, S, N, GROUP, shift, low, high, first, width, scale, cap, key, offset, run_rows, threshold, inverse_kept,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, GRANULE: tl.constexpr, HAS_CAP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr, WRAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries of one head.

    Q [B, T, N, H], K and V [B, S, N / GROUP, H] by strides; OUTPUT [B, T, N, H] and LOG_SUM [B, N, T], contiguous;
    QUERY_IDS [B, T], KEY_IDS [B, S] and RANGES, those of `SegmentRanges`, all or none; TABLE [N, width + 2 TABLE_PAD]
    or SLOPES [N], of base 2, or neither; RUNS int64, the numbers of the first weights of runs of `run_rows` rows, or
    `offset` that of the first of all.
    """
    HAS_IDS: tl.constexpr = RANGES is not None
    HAS_TABLE: tl.constexpr = TABLE is not None
    HAS_SLOPES: tl.constexpr = SLOPES is not None
    count = (T + BLOCK_M - 1) // BLOCK_M
    # The last tile first: under a causal mask it has the most to do.
    tile_m = count - 1 - tl.program_id(0) % count
    head_row = tl.program_id(0) // count
    b, h = (head_row // N).to(tl.int64), head_row % N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    q_rows = Q + b * q_sb + h.to(tl.int64) * q_sn + m.to(tl.int64)[:, None] * q_st + column[None, :]
    q = load_tile(q_rows, m, T, column, HEAD, BLOCK_D, False)
    K += b * k_sb + (h // GROUP).to(tl.int64) * k_sn + lanes[:, None] * k_ss + column[None, :]
    V += b * v_sb + (h // GROUP).to(tl.int64) * v_sn + lanes[:, None] * v_ss + column[None, :]
    query_ids = 0
    if HAS_IDS:
        KEY_IDS += b * S
        ids = tl.load(QUERY_IDS + b * T + m, mask=m < T, other=0)
        query_ids = tl.where(ids == 0, -1, ids)[:, None]
    slope = tl.load(SLOPES + h) if HAS_SLOPES else 0.0
    word, limit, here, beyond = 0, 0, 0, 0
    if DROP:
        row = head_row.to(tl.int64) * T + m
        word, limit, here, beyond = dropout_rows(RUNS, row, m < T, S, key, offset, run_rows, WRAPS)
        threshold = (threshold.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    begin, whole, whole_stop, stop = visible_tiles(
        RANGES, b, tile_m * BLOCK_M, T, S, shift, low, high, BLOCK_M, BLOCK_N, GRANULE
    )
    near, near_stop = whole_stop, whole_stop
    before, after = 0.0, 0.0
    if HAS_TABLE:
        TABLE += h * (width + 2 * TABLE_PAD) + TABLE_PAD - first
        before, after = tl.load(TABLE + first), tl.load(TABLE + first + width - 1)
        near, near_stop = near_tiles(tile_m * BLOCK_M, shift, first, first + width - 1, BLOCK_M, BLOCK_N)
        near = tl.minimum(tl.maximum(near, whole), whole_stop)
        near_stop = tl.minimum(tl.maximum(near_stop, near), whole_stop)
    start = tile_m * BLOCK_M + shift
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(0, near - whole + whole_stop - near_stop):
        tile = tl.where(i < near - whole, whole + i, near_stop + i - (near - whole))
        far_bias = tl.where(i < near - whole, before, after)
        total, top, weight = _update(
            total, top, weight, tile, far_bias, q, K, V, KEY_IDS, TABLE, query_ids, slope,
            word, limit, here, beyond, threshold, start, m, column, k_ss, v_ss, S, shift, low, high, first, width,
            scale, cap, HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
            False, True,
        )  # fmt: skip
    if HAS_TABLE:
        for i in range(0, near_stop - near):
            tile = near + i
            total, top, weight = _update(
                total, top, weight, tile, 0.0, q, K, V, KEY_IDS, TABLE, query_ids, slope,
                word, limit, here, beyond, threshold, start, m, column, k_ss, v_ss, S, shift, low, high, first, width,
                scale, cap, HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
                True, True,
            )  # fmt: skip
    for i in range(0, whole - begin + stop - whole_stop):
        tile = tl.where(i < whole - begin, begin + i, whole_stop + i - (whole - begin))
        total, top, weight = _update(
            total, top, weight, tile, 0.0, q, K, V, KEY_IDS, TABLE, query_ids, slope,
            word, limit, here, beyond, threshold, start, m, column, k_ss, v_ss, S, shift, low, high, first, width,
            scale, cap, HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
            HAS_TABLE, False,
        )  # fmt: skip
    seen = weight > 0
    divisor = tl.where(seen, weight, 1.0)
    if DROP:
        divisor = divisor / inverse_kept
    total = total / divisor[:, None]
    place = ((b * T + m)[:, None] * N + h) * HEAD + column[None, :]
    tl.store(OUTPUT + place, total.to(OUTPUT.dtype.element_ty), mask=(m[:, None] < T) & (column[None, :] < HEAD))
    log_sum = tl.where(seen, (top + tl.log2(tl.where(seen, weight, 1.0))) * LN_2, float("-inf"))
    tl.store(LOG_SUM + head_row.to(tl.int64) * T + m, log_sum, mask=m < T)
