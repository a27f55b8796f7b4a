"""What attention's kernels share: which tiles a program visits, the scores of a tile, the bits of dropout.

Legend: m a query's place, n a key's, d = n - m - shift their distance; T queries, S keys, N query heads. Scores, maxima
and sums are of base 2: exp2 is one instruction, and log2(e) is a part of factors that are there anyway.
"""

from __future__ import annotations

import torch

from megaseq.kernels.attention import bias_table
from megaseq.kernels.dropout.triton_kernels import HIGH_STRIDE, STRIDE, hash_of, mixed_high, plus, times
from megaseq.kernels.triton_runtime import interpreted, tl, triton

LOG2_E = tl.constexpr(bias_table.LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(1 << 30)
TABLE_PAD = tl.constexpr(bias_table.TABLE_PAD)
_PTX = tl.constexpr(not interpreted() and torch.version.hip is None)


@triton.jit
def visible_tiles(
    RANGES,
    batch,
    start,
    rows,
    columns,
    shift,
    low,
    high,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Which tiles of `columns` the rows from `start` on see, as numbers of tiles: (first, first whole, end of the whole
    ones, end). A column c and a row r see each other if low <= c - r - shift <= high and their segments are one; in a
    whole tile that needs no proof for any pair, and all columns exist. Rows from `rows` on do not count."""
    last = tl.minimum(start + BLOCK_R, rows) - 1
    begin = tl.maximum(start + shift + low, 0)
    end = tl.minimum(last + shift + high + 1, columns)
    whole_begin = tl.maximum(last + shift + low, 0)
    whole_end = tl.maximum(tl.minimum(start + shift + high + 1, columns), 0)
    if RANGES is not None:
        count = (rows + GRANULE - 1) // GRANULE
        granule = start // GRANULE + tl.arange(0, BLOCK_R // GRANULE)
        there = granule < count
        place = RANGES + (batch * count + granule) * 4
        begin = tl.maximum(begin, tl.min(tl.load(place, mask=there, other=NEVER), 0))
        end = tl.minimum(end, tl.max(tl.load(place + 1, mask=there, other=0), 0))
        whole_begin = tl.maximum(whole_begin, tl.max(tl.load(place + 2, mask=there, other=0), 0))
        whole_end = tl.minimum(whole_end, tl.min(tl.load(place + 3, mask=there, other=NEVER), 0))
    first = begin // BLOCK_C
    stop = tl.maximum((tl.maximum(end, 0) + BLOCK_C - 1) // BLOCK_C, first)
    whole = tl.minimum(tl.maximum((whole_begin + BLOCK_C - 1) // BLOCK_C, first), stop)
    whole_stop = tl.minimum(tl.maximum(whole_end // BLOCK_C, whole), stop)
    return first, whole, whole_stop, stop


@triton.jit
def near_tiles(start, shift, lowest, highest, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which tiles of columns are near the rows from `start` on: (first, end). In those before, all c - r - shift are at
    most `lowest`, in those from the end on at least `highest`."""
    before = lowest + start + shift + 1 - BLOCK_C
    near = tl.where(before >= 0, tl.maximum(before, 0) // BLOCK_C + 1, 0)
    after = highest + start + BLOCK_R - 1 + shift
    far = (tl.maximum(after, 0) + BLOCK_C - 1) // BLOCK_C
    return near, tl.maximum(far, near)


@triton.jit
def load_tile(pointers, place, stop, column, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of queries, keys or values [R, BLOCK_D]; zeros from row `stop` and from column HEAD on."""
    if WHOLE and HEAD == BLOCK_D:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=column[None, :] < HEAD, other=0.0)
    if HEAD == BLOCK_D:
        return tl.load(pointers, mask=place[:, None] < stop, other=0.0)
    return tl.load(pointers, mask=(place[:, None] < stop) & (column[None, :] < HEAD), other=0.0)


@triton.jit
def tanh(x):
    """tanh to a few ulp; the tools that run kernels on a host have none."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * LOG2_E))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    # The difference above loses digits near zero; a series does not.
    small = x * (1.0 - square * (0.3333333333 - square * (0.1333333333 - square * 0.0539682540)))
    return tl.where(size < 0.15, small, tl.where(x < 0, -large, large))


@triton.jit
def _spread(NUMBER: tl.constexpr, STEP: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """[BEFORE * NUMBER * AFTER]: STEP times 0 to NUMBER - 1, each AFTER times, and all that BEFORE times."""
    part = (tl.arange(0, NUMBER).to(tl.int64) * STEP)[None, :, None]
    return tl.reshape(tl.broadcast_to(part, (BEFORE, NUMBER, AFTER)), (BEFORE * NUMBER * AFTER,))


@triton.jit
def biases_of(TABLE, corner, first, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The table's biases of a tile [queries, keys], or [keys, queries], by the distance of its first pair.

    A tensor core leaves a thread rows r and r + 8 and pairs of columns in steps of 8. Places are therefore put together
    from what differs between threads, which is one number for each, and what differs between a thread's registers,
    which the compiler knows: one base with offsets, and each of the distances that the two rows share is loaded once,
    18 for 32 elements of a tile of 64 columns.
    """
    low, high = (1 - ROWS, COLUMNS - 1) if KEYS_FIRST else (1 - COLUMNS, ROWS - 1)
    # Beyond, all distances of the tile have the table's first bias, or all its last.
    corner = tl.minimum(tl.maximum(corner, first + low), first + width - 1 + high)
    row = _spread(ROWS // 16, 16, 1, 16) + _spread(8, 1, ROWS // 8, 1)
    column = _spread(4, 2, COLUMNS // 8, 2)
    upper_row = _spread(2, 8, ROWS // 16, 8)
    known_column = _spread(COLUMNS // 8, 8, 1, 8) + _spread(2, 1, COLUMNS // 2, 1)
    if KEYS_FIRST:
        of_thread = row[:, None] - column[None, :]
        of_register = upper_row[:, None] - known_column[None, :]
    else:
        of_thread = column[None, :] - row[:, None]
        of_register = known_column[None, :] - upper_row[:, None]
    if _PTX:
        # A load that Triton knows would be copied to shared memory element by element and read from there.
        place = (TABLE + corner).to(tl.int64) + 4 * of_thread + 4 * of_register
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [place], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.load(TABLE + corner + of_thread + of_register)


@triton.jit
def scores_of(
    qk, m, n, extra, biases, slope, shift, scale, cap,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """The scores of a tile plus `extra` plus `biases`, and the soft cap's derivative.

    Args as tensors that broadcast to the tile: m, n, extra, biases; either of the last two, or both, may be none.
    `scale` makes base 2 of the products, or with a cap what tanh takes, and `cap` makes base 2 of what it returns.
    """
    if biases is None:
        added = extra
    elif extra is None:
        added = biases
    else:
        added = extra + biases
    bend = 1.0
    if HAS_CAP:
        bent = tanh(qk * scale)
        bend = 1.0 - bent * bent
        x = bent * cap + added
    else:
        x = qk * scale + added
    if HAS_SLOPES:
        # Differences of whole numbers below 2^24, which are exact.
        x -= slope * tl.abs(n.to(tl.float32) - (m + shift).to(tl.float32))
    return x, bend


@triton.jit
def sees(m, n, query_ids, key_ids, shift, low, high, S, HAS_IDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Which pairs of a tile see each other; ids of pads differ from all others."""
    allowed = query_ids == key_ids if HAS_IDS else n < S
    if LOW:
        allowed = allowed & (n - (m + shift) >= low)
    if HIGH:
        allowed = allowed & (n - (m + shift) <= high)
    return allowed


@triton.jit
def dropout_rows(RUNS, row, there, S, key, offset, run_rows, WRAPS: tl.constexpr):
    """What dropout's hashes need of rows [R] of weights, numbered among [B, N, T]: (low words, highest column whose low
    word does not wrap, what the high word adds up to there and beyond), uint32 [R] each. Without WRAPS the high word is
    that of `offset` for all rows, and RUNS is none."""
    key = key.to(tl.int64)
    key_high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key_low = (key & 0xFFFFFFFF).to(tl.uint32)
    if not WRAPS:
        low = plus(times(row.to(tl.uint32), S.to(tl.uint32)), (offset.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32))
        word = plus(times(low, STRIDE), key_low)
        high = times(((offset.to(tl.int64) >> 32) & 0xFFFFFFFF).to(tl.uint32), HIGH_STRIDE)
        here = mixed_high(plus(high, key_high)) + tl.zeros_like(word)
        return word, ~low, here, here
    if RUNS is not None:
        start = tl.load(RUNS + row // run_rows, mask=there, other=0) + (row % run_rows) * S
    else:
        start = offset + row * S
    low = (start & 0xFFFFFFFF).to(tl.uint32)
    here = plus(times(((start >> 32) & 0xFFFFFFFF).to(tl.uint32), HIGH_STRIDE), key_high)
    word = plus(times(low, STRIDE), key_low)
    return word, ~low, mixed_high(here), mixed_high(plus(here, HIGH_STRIDE))


@triton.jit
def kept_of(word, limit, here, beyond, n, threshold, WRAPS: tl.constexpr):
    """Which weights of a tile dropout keeps; all but the threshold broadcast to it. The formula is in
    megaseq/csrc/dropout.h; without WRAPS no row has a number whose low word wraps."""
    column = n.to(tl.uint32)
    high = tl.where(column > limit, beyond, here) if WRAPS else here
    return hash_of(plus(word, times(column, STRIDE)), high) >= threshold
