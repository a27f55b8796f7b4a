"""The backward kernels of attention: one for the gradients of queries and bias, one for those of keys and values.

Weights are computed again from the log-sum-exp (Dao 2023, "FlashAttention-2"). The gradient of a table of biases is
what this file adds: the gradients of a tile's scores, summed along the tile's diagonals, where distances are equal.
Each program adds into a row of its own, and the rows are summed afterwards in a fixed order.
"""

from __future__ import annotations

from megaseq.kernels.attention.triton_parts import (
    LN_2,
    LOG2_E,
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
def _add_diagonals(PARTS, ds, corner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds the sums of a tile's diagonals, made the gradient of biases of base 2, to a row of sums by distance.

    PARTS points at distance 0, `corner` is the distance of the tile's first pair. The diagonals of all 8 x 8 blocks are
    summed at once, by a product with zeros and ones: of block [8a..., 8b...] there are 15, at `corner` + 8 (b - a), and
    a sixteenth that is empty.
    """
    ROWS: tl.constexpr = BLOCK_M // 8
    COLUMNS: tl.constexpr = BLOCK_N // 8
    blocks = tl.permute(tl.reshape(ds, (ROWS, 8, COLUMNS, 8)), (0, 2, 1, 3))
    pair = tl.arange(0, 64)[:, None]
    diagonal = tl.arange(0, 16)[None, :] - 8
    ones = (pair % 8 - pair // 8 == diagonal).to(ds.dtype)
    sums = tl.dot(tl.reshape(blocks, (ROWS * COLUMNS, 64)), ones, input_precision="ieee")
    block = tl.arange(0, ROWS * COLUMNS)[:, None]
    place = PARTS + corner + (block % COLUMNS - block // COLUMNS) * 8 + diagonal
    tl.atomic_add(place, sums * LN_2, sem="relaxed")


@triton.jit
def _of_rows(LOG_SUM, OF_LOG_SUM, NEGATIVE_SUM, DELTA, o, do, rows, there):
    """What the gradients of scores need of each query: computed, and stored for the other kernel."""
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if OF_LOG_SUM is not None:
        delta -= tl.load(OF_LOG_SUM + rows, mask=there, other=0.0)
    tl.store(DELTA + rows, delta, mask=there)
    log_sum = tl.load(LOG_SUM + rows, mask=there, other=float("-inf"))
    # Rows that see nothing, and those that are not there: all their weights are exp2(-inf).
    negative_sum = tl.where(log_sum == float("-inf"), float("-inf"), log_sum * -LOG2_E)
    tl.store(NEGATIVE_SUM + rows, negative_sum, mask=there)
    return negative_sum, delta


@triton.jit
def _query_update(
    dq, left, right, tile, far_bias, q, do, negative_sum, delta, K, V, KEY_IDS, TABLE, PARTS, query_ids, slope,
    word, limit, here, beyond, threshold, inverse_kept, start, m, column, k_ss, v_ss, S, shift, low, high,
    first, width, near, near_stop, scale, cap,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_IDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr,
    WRAPS: tl.constexpr,
    OF_TABLE: tl.constexpr, NEAR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to the gradients of a tile of queries and of the biases between them."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(K + tile.to(tl.int64) * BLOCK_N * k_ss, n, S, column, HEAD, BLOCK_D, WHOLE)
    v = load_tile(V + tile.to(tl.int64) * BLOCK_N * v_ss, n, S, column, HEAD, BLOCK_D, WHOLE)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    corner = tile * BLOCK_N - start
    biases = None
    if NEAR:
        biases = biases_of(TABLE, corner, first, width, BLOCK_M, BLOCK_N, False)
    x, bend = scores_of(
        qk, m[:, None], n[None, :], (negative_sum + far_bias)[:, None], biases, slope, shift, scale, cap,
        HAS_CAP, HAS_SLOPES,
    )  # fmt: skip
    if not WHOLE:
        key_ids = 0
        if HAS_IDS:
            key_ids = tl.load(KEY_IDS + n, mask=n < S, other=0)[None, :]
        allowed = sees(m[:, None], n[None, :], query_ids, key_ids, shift, low, high, S, HAS_IDS, LOW, HIGH)
        x = tl.where(allowed, x, float("-inf"))
    p = tl.exp2(x)
    if DROP:
        kept = kept_of(word[:, None], limit[:, None], here[:, None], beyond[:, None], n[None, :], threshold, WRAPS)
        dp = tl.where(kept, dp, 0.0) * inverse_kept
    ds = p * (dp - delta[:, None])
    if OF_TABLE:
        if NEAR and WHOLE:
            _add_diagonals(PARTS, ds.to(k.dtype), corner, BLOCK_M, BLOCK_N)
        else:
            sums = tl.sum(ds, 1)
            left += tl.where(tile < near, sums, 0.0)
            right += tl.where(tile >= near_stop, sums, 0.0)
            if not WHOLE:  # noqa: SIM102, the compiler knows the first condition and not the second
                if (tile >= near) & (tile < near_stop):
                    _add_diagonals(PARTS, ds.to(k.dtype), corner, BLOCK_M, BLOCK_N)
    if HAS_CAP:
        ds = ds * bend
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq, left, right


@triton.jit(
    do_not_specialize=[
        "T", "S", "shift", "low", "high", "first", "width", "key", "offset", "run_rows", "threshold", "parts_rows",
    ]
)  # fmt: skip
def attention_backward_query(
    Q, K, V, OUTPUT, LOG_SUM, OF_OUTPUT, OF_LOG_SUM, NEGATIVE_SUM, DELTA, DQ, PARTS,
    QUERY_IDS, KEY_IDS, RANGES, TABLE, SLOPES, RUNS,
    q_sb, q_st, q_sn, k_sb, k_ss, k_sn, v_sb, v_ss, v_sn, do_sb, do_st, do_sn,
    T, S, N, GROUP, shift, low, high, first, width, parts_rows, raw_scale, scale, cap,
    key, offset, run_rows, threshold, inverse_kept,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, GRANULE: tl.constexpr, HAS_CAP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr, WRAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries of one head; runs before the other kernel, for which it leaves two tensors.

    As `attention_forward`, and: OUTPUT, DQ [B, T, N, H] contiguous; OF_OUTPUT the gradient of OUTPUT by strides,
    OF_LOG_SUM that of LOG_SUM or none; float32 [B, N, T] for the other kernel: NEGATIVE_SUM, what is added to scores
    of base 2 before they become weights, and DELTA, the sum over a query's keys of weight times the weight's gradient;
    PARTS float32 [N, parts_rows, width + 2 TABLE_PAD], zeros, or none, for the table.
    """
    HAS_IDS: tl.constexpr = RANGES is not None
    HAS_TABLE: tl.constexpr = TABLE is not None
    HAS_SLOPES: tl.constexpr = SLOPES is not None
    OF_TABLE: tl.constexpr = PARTS is not None
    count = (T + BLOCK_M - 1) // BLOCK_M
    tile_m = count - 1 - tl.program_id(0) % count
    head_row = tl.program_id(0) // count
    b, h = (head_row // N).to(tl.int64), head_row % N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    q_rows = Q + b * q_sb + h.to(tl.int64) * q_sn + m.to(tl.int64)[:, None] * q_st + column[None, :]
    do_rows = OF_OUTPUT + b * do_sb + h.to(tl.int64) * do_sn + m.to(tl.int64)[:, None] * do_st + column[None, :]
    place = ((b * T + m)[:, None] * N + h) * HEAD + column[None, :]
    q = load_tile(q_rows, m, T, column, HEAD, BLOCK_D, False)
    do = load_tile(do_rows, m, T, column, HEAD, BLOCK_D, False)
    o = load_tile(OUTPUT + place, m, T, column, HEAD, BLOCK_D, False)
    rows = head_row.to(tl.int64) * T + m
    negative_sum, delta = _of_rows(LOG_SUM, OF_LOG_SUM, NEGATIVE_SUM, DELTA, o, do, rows, m < T)
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
        word, limit, here, beyond = dropout_rows(RUNS, rows, m < T, S, key, offset, run_rows, WRAPS)
        threshold = (threshold.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    begin, whole, whole_stop, stop = visible_tiles(
        RANGES, b, tile_m * BLOCK_M, T, S, shift, low, high, BLOCK_M, BLOCK_N, GRANULE
    )
    all_near, all_near_stop = whole_stop, whole_stop
    before, after = 0.0, 0.0
    if HAS_TABLE:
        TABLE += h * (width + 2 * TABLE_PAD) + TABLE_PAD - first
        before, after = tl.load(TABLE + first), tl.load(TABLE + first + width - 1)
        all_near, all_near_stop = near_tiles(tile_m * BLOCK_M, shift, first, first + width - 1, BLOCK_M, BLOCK_N)
    near = tl.minimum(tl.maximum(all_near, whole), whole_stop)
    near_stop = tl.minimum(tl.maximum(all_near_stop, near), whole_stop)
    if OF_TABLE:
        part = h * parts_rows + (b.to(tl.int32) * count + tile_m) % parts_rows
        PARTS += part.to(tl.int64) * (width + 2 * TABLE_PAD) + TABLE_PAD - first
    start = tile_m * BLOCK_M + shift
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    left, right = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for i in range(0, near - whole + whole_stop - near_stop):
        tile = tl.where(i < near - whole, whole + i, near_stop + i - (near - whole))
        far_bias = tl.where(i < near - whole, before, after)
        dq, left, right = _query_update(
            dq, left, right, tile, far_bias, q, do, negative_sum, delta, K, V, KEY_IDS, TABLE, PARTS, query_ids, slope,
            word, limit, here, beyond, threshold, inverse_kept, start, m, column, k_ss, v_ss, S, shift, low, high,
            first, width, all_near, all_near_stop, scale, cap,
            HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
            OF_TABLE, False, True,
        )  # fmt: skip
    if HAS_TABLE:
        for i in range(0, near_stop - near):
            tile = near + i
            dq, left, right = _query_update(
                dq, left, right, tile, 0.0, q, do, negative_sum, delta, K, V, KEY_IDS, TABLE, PARTS, query_ids, slope,
                word, limit, here, beyond, threshold, inverse_kept, start, m, column, k_ss, v_ss, S, shift, low, high,
                first, width, all_near, all_near_stop, scale, cap,
                HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
                OF_TABLE, True, True,
            )  # fmt: skip
    for i in range(0, whole - begin + stop - whole_stop):
        tile = tl.where(i < whole - begin, begin + i, whole_stop + i - (whole - begin))
        dq, left, right = _query_update(
            dq, left, right, tile, 0.0, q, do, negative_sum, delta, K, V, KEY_IDS, TABLE, PARTS, query_ids, slope,
            word, limit, here, beyond, threshold, inverse_kept, start, m, column, k_ss, v_ss, S, shift, low, high,
            first, width, all_near, all_near_stop, scale, cap,
            HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS,
            OF_TABLE, HAS_TABLE, False,
        )  # fmt: skip
    tl.store(DQ + place, (dq * raw_scale).to(DQ.dtype.element_ty), mask=(m[:, None] < T) & (column[None, :] < HEAD))
    if OF_TABLE:
        tl.atomic_add(PARTS + first, tl.sum(left, 0) * LN_2, sem="relaxed")
        tl.atomic_add(PARTS + first + width - 1, tl.sum(right, 0) * LN_2, sem="relaxed")


@triton.jit
def _key_update(
    dk, dv, tile, far_bias, k, v, Q, OF_OUTPUT, NEGATIVE_SUM, DELTA, QUERY_IDS, TABLE, RUNS, key_ids, slope,
    key, offset, run_rows, threshold, inverse_kept, rows, start, n, column, q_st, do_st, T, S, shift, low, high,
    first, width, scale, cap,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_IDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr,
    WRAPS: tl.constexpr,
    NEAR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries gives to the gradients of a tile of keys and values; tiles are [keys, queries]."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(Q + tile.to(tl.int64) * BLOCK_M * q_st, m, T, column, HEAD, BLOCK_D, WHOLE)
    do = load_tile(OF_OUTPUT + tile.to(tl.int64) * BLOCK_M * do_st, m, T, column, HEAD, BLOCK_D, WHOLE)
    if WHOLE:
        negative_sum, delta = tl.load(NEGATIVE_SUM + rows + m), tl.load(DELTA + rows + m)
    else:
        negative_sum = tl.load(NEGATIVE_SUM + rows + m, mask=m < T, other=float("-inf"))
        delta = tl.load(DELTA + rows + m, mask=m < T, other=0.0)
    kq = tl.dot(k, tl.trans(q), input_precision="ieee")
    biases = None
    if NEAR:
        biases = biases_of(TABLE, start - tile * BLOCK_M, first, width, BLOCK_N, BLOCK_M, True)
    x, bend = scores_of(
        kq, m[None, :], n[:, None], (negative_sum + far_bias)[None, :], biases, slope, shift, scale, cap,
        HAS_CAP, HAS_SLOPES,
    )  # fmt: skip
    if not WHOLE:
        query_ids = 0
        if HAS_IDS:
            query_ids = tl.load(QUERY_IDS + m, mask=m < T, other=0)[None, :]
        allowed = sees(m[None, :], n[:, None], query_ids, key_ids, shift, low, high, S, HAS_IDS, LOW, HIGH)
        x = tl.where(allowed, x, float("-inf"))
    p = tl.exp2(x)
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    if DROP:
        word, limit, here, beyond = dropout_rows(RUNS, rows + m, m < T, S, key, offset, run_rows, WRAPS)
        kept = kept_of(word[None, :], limit[None, :], here[None, :], beyond[None, :], n[:, None], threshold, WRAPS)
        dp = tl.where(kept, dp, 0.0) * inverse_kept
        dropped = tl.where(kept, p, 0.0)
    else:
        dropped = p
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if HAS_CAP:
        ds = ds * bend
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(
    do_not_specialize=["T", "S", "shift", "low", "high", "first", "width", "key", "offset", "run_rows", "threshold"]
)
def attention_backward_key(
    Q, K, V, NEGATIVE_SUM, OF_OUTPUT, DELTA, DK, DV, QUERY_IDS, KEY_IDS, RANGES, TABLE, SLOPES, RUNS,
    q_sb, q_st, q_sn, k_sb, k_ss, k_sn, v_sb, v_ss, v_sn, do_sb, do_st, do_sn,
    T, S, N, GROUP, shift, low, high, first, width, raw_scale, scale, cap,
    key, offset, run_rows, threshold, inverse_kept,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, GRANULE: tl.constexpr, HAS_CAP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr, WRAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one key head, summed over its query heads.

    As `attention_backward_query`, with DK and DV [B, S, N / GROUP, H], contiguous; RANGES are those of queries.
    """
    HAS_IDS: tl.constexpr = RANGES is not None
    HAS_TABLE: tl.constexpr = TABLE is not None
    HAS_SLOPES: tl.constexpr = SLOPES is not None
    count = (S + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % count
    heads = N // GROUP
    b, key_head = (tl.program_id(0) // count // heads).to(tl.int64), tl.program_id(0) // count % heads
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_M).to(tl.int64)
    k_rows = K + b * k_sb + key_head.to(tl.int64) * k_sn + n.to(tl.int64)[:, None] * k_ss + column[None, :]
    v_rows = V + b * v_sb + key_head.to(tl.int64) * v_sn + n.to(tl.int64)[:, None] * v_ss + column[None, :]
    k = load_tile(k_rows, n, S, column, HEAD, BLOCK_D, False)
    v = load_tile(v_rows, n, S, column, HEAD, BLOCK_D, False)
    key_ids = 0
    if HAS_IDS:
        QUERY_IDS += b * T
        ids = tl.load(KEY_IDS + b * S + n, mask=n < S, other=0)
        key_ids = tl.where(ids == 0, -1, ids)[:, None]
    if DROP:
        threshold = (threshold.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    # Seen from the keys, distances change their sign.
    begin, whole, whole_stop, stop = visible_tiles(
        RANGES, b, tile_n * BLOCK_N, S, T, -shift, -high, -low, BLOCK_N, BLOCK_M, GRANULE
    )
    near, near_stop = whole_stop, whole_stop
    if HAS_TABLE:
        near, near_stop = near_tiles(tile_n * BLOCK_N, -shift, 1 - first - width, -first, BLOCK_N, BLOCK_M)
        near = tl.minimum(tl.maximum(near, whole), whole_stop)
        near_stop = tl.minimum(tl.maximum(near_stop, near), whole_stop)
    start = tile_n * BLOCK_N - shift
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, GROUP):
        h = key_head * GROUP + member
        q_rows = Q + b * q_sb + h.to(tl.int64) * q_sn + lanes[:, None] * q_st + column[None, :]
        do_rows = OF_OUTPUT + b * do_sb + h.to(tl.int64) * do_sn + lanes[:, None] * do_st + column[None, :]
        rows = (b * N + h) * T
        slope = tl.load(SLOPES + h) if HAS_SLOPES else 0.0
        head_table, before, after = TABLE, 0.0, 0.0
        if HAS_TABLE:
            head_table = TABLE + h * (width + 2 * TABLE_PAD) + TABLE_PAD - first
            before, after = tl.load(head_table + first), tl.load(head_table + first + width - 1)
        for i in range(0, near - whole + whole_stop - near_stop):
            tile = tl.where(i < near - whole, whole + i, near_stop + i - (near - whole))
            far_bias = tl.where(i < near - whole, after, before)
            dk, dv = _key_update(
                dk, dv, tile, far_bias, k, v, q_rows, do_rows, NEGATIVE_SUM, DELTA, QUERY_IDS, head_table, RUNS,
                key_ids, slope, key, offset, run_rows, threshold, inverse_kept, rows, start, n, column, q_st, do_st,
                T, S, shift, low, high, first, width, scale, cap,
                HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS, False, True,
            )  # fmt: skip
        if HAS_TABLE:
            for i in range(0, near_stop - near):
                tile = near + i
                dk, dv = _key_update(
                    dk, dv, tile, 0.0, k, v, q_rows, do_rows, NEGATIVE_SUM, DELTA, QUERY_IDS, head_table, RUNS, key_ids,
                    slope, key, offset, run_rows, threshold, inverse_kept, rows, start, n, column, q_st, do_st, T, S,
                    shift, low, high, first, width, scale, cap,
                    HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS, True, True,
                )  # fmt: skip
        for i in range(0, whole - begin + stop - whole_stop):
            tile = tl.where(i < whole - begin, begin + i, whole_stop + i - (whole - begin))
            dk, dv = _key_update(
                dk, dv, tile, 0.0, k, v, q_rows, do_rows, NEGATIVE_SUM, DELTA, QUERY_IDS, head_table, RUNS, key_ids,
                slope, key, offset, run_rows, threshold, inverse_kept, rows, start, n, column, q_st, do_st, T, S,
                shift, low, high, first, width, scale, cap,
                HEAD, BLOCK_D, BLOCK_M, BLOCK_N, HAS_CAP, HAS_SLOPES, HAS_IDS, LOW, HIGH, DROP, WRAPS, HAS_TABLE, False,
            )  # fmt: skip
    place = ((b * S + n)[:, None] * heads + key_head) * HEAD + column[None, :]
    there = (n[:, None] < S) & (column[None, :] < HEAD)
    tl.store(DK + place, (dk * raw_scale).to(DK.dtype.element_ty), mask=there)
    if DROP:
        dv = dv * inverse_kept
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=there)
