# mypy: ignore-errors
"""Triton: one pass over the logits for their sum and their best, and one program a source that merges.

What is compared is an int64 key of (number, id): the number's bits, made to order as integers do, above
2 ** 32 - 1 - id, so that one maximum finds the best, and the lower id among equals. The best are found one maximum at a
time, never by sorting.

Legend: B sources, K hypotheses, V vocabulary, C proposals of each hypothesis.
"""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton

_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)
_LOW_HALF = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _keys(numbers, ids):
    """Keys of fp32 `numbers` and int64 `ids`; zeros of both signs are equal."""
    bits = tl.where(numbers == 0.0, 0.0, numbers).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) + (_LOW_HALF - ids)


@triton.jit
def _number(ordered):
    """The number whose ordered bits these int32 are."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _number_of(keys):
    return _number((keys >> 32).to(tl.int32))


@triton.jit
def _id_of(keys):
    return _LOW_HALF - (keys & _LOW_HALF)


@triton.jit
def _no_best(keep, TOP: tl.constexpr):
    """An empty list of the `keep` best keys; each place holds its own key below all real ones."""
    place = tl.arange(0, TOP).to(tl.int64)
    return tl.where(place < keep, place + _LOWEST, _HIGHEST)


@triton.jit
def _insert(keys, best):
    """`best` after those of `keys` that belong there have come in, one by one."""
    worst = tl.min(best, 0)
    found = tl.max(keys, 0)
    while found > worst:
        best = tl.where(best == worst, found, best)
        worst = tl.min(best, 0)
        keys = tl.where(keys == found, _LOWEST, keys)
        found = tl.max(keys, 0)
    return best


@triton.jit(do_not_specialize=["eos_id", "num_hyps", "keep", "num_chunks", "tiles", "tiles_per_chunk", "forbid_stride"])
def best_of_chunks(
    logits, forbid_eos, tops, sums, lows, keys, vocab, row_stride, stride, eos_id, num_hyps, keep, num_chunks, tiles,
    tiles_per_chunk, forbid_stride, NORMALISED: tl.constexpr, FORBID: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit of a chunk of one row, the sum of exponentials below it, and the chunk's `keep` best.

    Writes tops, sums and the worst key of those kept where some are not, [B * K, chunks], and the keys kept,
    [B * K, chunks, keep], in no order. NORMALISED: the sum is NaN if a number is, and else 0.
    """
    chunk = tl.program_id(0) % num_chunks
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    forbidden = False
    if FORBID:
        forbidden = tl.load(forbid_eos + (row // num_hyps) * forbid_stride) != 0
    best = _no_best(keep, TOP)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    first = chunk * tiles_per_chunk
    for tile in range(first, tl.minimum(first + tiles_per_chunk, tiles)):
        v = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        there = v < vocab
        x = tl.load(logits + row * row_stride + v * stride, mask=there, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, 0)
        if NORMALISED:
            total += tl.sum(tl.where(x != x, x, 0.0), 0)
        else:
            higher = tl.maximum(top, highest)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe), 0)
            top = higher
        bound = _number_of(tl.min(best, 0))
        # The bound of a list with empty places is NaN.
        if (highest >= bound) | (bound != bound):
            if FORBID:
                x = tl.where(forbidden & (v == eos_id), float("-inf"), x)
            best = _insert(tl.where(there, _keys(x, v), _LOWEST), best)
    at = row * num_chunks + chunk
    tl.store(tops + at, top)
    tl.store(sums + at, total)
    left_out = tl.minimum((chunk + 1) * tiles_per_chunk * BLOCK, vocab) - first * BLOCK > keep
    tl.store(lows + at, tl.where(left_out, tl.min(best, 0), _LOWEST))
    place = tl.arange(0, TOP)
    tl.store(keys + at * keep + place, best, mask=place < keep)


@triton.jit
def _look_again(
    best, logits, top, shift, source, forbidden, vocab, row_stride, stride, eos_id, num_hyps, count,
    FORBID: tl.constexpr, HYPS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best keys [HYPS, COUNT] of a source by a second pass over its logits, which compares values."""
    k = tl.arange(0, HYPS)
    column = tl.arange(0, COUNT)
    for hyp in range(0, num_hyps):
        mine = k == hyp
        its_top = tl.sum(tl.where(mine, top, 0.0), 0)
        its_shift = tl.sum(tl.where(mine, shift, 0.0), 0)
        exact = _no_best(count, COUNT)
        for first in range(0, vocab, BLOCK):
            v = (first + tl.arange(0, BLOCK)).to(tl.int64)
            within = v < vocab
            at = (source * num_hyps + hyp) * row_stride + v * stride
            x = tl.load(logits + at, mask=within, other=float("-inf")).to(tl.float32)
            if FORBID:
                x = tl.where(forbidden & (v == eos_id), float("-inf"), x)
            exact = _insert(tl.where(within, _keys((x - its_top) - its_shift, v), _LOWEST), exact)
        exact = tl.where(column < count, exact, _LOWEST)
        for i in range(0, count):
            found = tl.max(exact, 0)
            best = tl.where(mine[:, None] & (column[None, :] == i), found, best)
            exact = tl.where(exact == found, _LOWEST, exact)
    return best


@triton.jit(
    do_not_specialize=[
        "eos_id", "num_hyps", "count", "size", "keep", "num_chunks", "total_b", "total_k", "forbid_stride"
    ]
)  # fmt: skip
def merge_chunks(
    logits, forbid_eos, tops, sums, lows, keys, total, score, ids, eos_score, eos_allowed, next_score, next_parents,
    next_ids, vocab, row_stride, stride, eos_id, num_hyps, count, size, keep, num_chunks, delta, threshold, total_b,
    total_k, forbid_stride, NORMALISED: tl.constexpr, FORBID: tl.constexpr, STEP: tl.constexpr, HYPS: tl.constexpr,
    CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of one source, of what `best_of_chunks` left of its hypotheses. STEP: between the ordered bits of
    neighbouring logits; CHUNKS and CANDIDATES: powers of 2, at least num_chunks and num_chunks * keep."""
    source = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, HYPS)
    live = k < num_hyps
    row = source * num_hyps + k
    so_far = tl.load(total + source * total_b + k * total_k, mask=live, other=float("-inf"))
    forbidden = False
    if FORBID:
        forbidden = tl.load(forbid_eos + source * forbid_stride) != 0

    c = tl.arange(0, CHUNKS)
    at_chunk = row[:, None] * num_chunks + c[None, :]
    there = live[:, None] & (c < num_chunks)[None, :]
    chunk_top = tl.load(tops + at_chunk, mask=there, other=float("-inf"))
    chunk_sum = tl.load(sums + at_chunk, mask=there, other=0.0)
    if NORMALISED:
        broken = tl.sum(chunk_sum, 1) != 0.0
        top = tl.zeros((HYPS,), tl.float32)
        shift = top
    else:
        top = tl.max(chunk_top, 1)
        dead = top == float("-inf")
        top = tl.where(dead, 0.0, top)
        row_sum = tl.sum(chunk_sum * tl.exp(chunk_top - top[:, None]), 1)
        broken = row_sum != row_sum
        shift = tl.where(dead, 0.0, tl.log(row_sum))

    n = tl.arange(0, CANDIDATES)
    listed = live[:, None] & (n < num_chunks * keep)[None, :]
    key = tl.load(keys + row[:, None] * (num_chunks * keep) + n[None, :], mask=listed, other=_LOWEST)
    # Places that a short chunk left empty have ids that are no tokens.
    listed = listed & (_id_of(key) < vocab)
    by_value = tl.where(listed, _keys((_number_of(key) - top[:, None]) - shift[:, None], _id_of(key)), _LOWEST)
    column = tl.arange(0, COUNT)
    best = tl.full((HYPS, COUNT), _LOWEST, tl.int64)
    border = tl.full((HYPS,), _LOWEST, tl.int64)
    for i in range(0, count):
        border = tl.max(by_value, 1)
        best = tl.where(column[None, :] == i, border[:, None], best)
        by_value = tl.where(by_value == border[:, None], _LOWEST, by_value)

    # Rounding makes values equal whose logits are not, and then the lower id wins, which a chunk may have left out for
    # its lower logit. That needs a chunk whose worst candidate is as good as the border, and a logit below that one
    # that would be so, too.
    low = tl.load(lows + at_chunk, mask=there, other=_LOWEST)
    cut = _number_of(border)
    below = _number(tl.where(low == _LOWEST, 0, (low >> 32).to(tl.int32)) - STEP)
    tied = (low != _LOWEST) & ((below - top[:, None]) - shift[:, None] == cut[:, None])
    if tl.max(tl.max(tied.to(tl.int32), 1), 0) > 0:
        best = _look_again(
            best, logits, top, shift, source, forbidden, vocab, row_stride, stride, eos_id, num_hyps, count,
            FORBID, HYPS, COUNT, BLOCK,
        )  # fmt: skip

    real = live[:, None] & (column < count)[None, :]
    value = tl.where(broken[:, None], float("nan"), _number_of(best))
    token = tl.where(broken[:, None], column[None, :].to(tl.int64), _id_of(best))
    whole = so_far[:, None] + value
    at_proposal = row[:, None] * count + column[None, :]
    tl.store(score + at_proposal, whole, mask=real)
    tl.store(ids + at_proposal, token, mask=real)

    x = tl.load(logits + row * row_stride + eos_id * stride, mask=live, other=float("-inf")).to(tl.float32)
    local = tl.where(broken, float("nan"), (x - top) - shift)
    if FORBID:
        local = tl.where(forbidden & (broken == 0), float("-inf"), local)
    ended = so_far + local
    first_score = tl.sum(tl.where(column[None, :] == 0, whole, 0.0), 1)
    allowed = (ended >= first_score - delta) & (local > threshold)
    tl.store(eos_score + row, ended, mask=live)
    tl.store(eos_allowed + row, allowed, mask=live)

    going = tl.where(token == eos_id, float("-inf"), whole)
    candidates = tl.where(real, _keys(going, token * num_hyps + k[:, None]), _LOWEST)
    for i in range(0, size):
        found = tl.max(tl.max(candidates, 1), 0)
        none = found == _LOWEST
        rank = tl.where(none, 0, _id_of(found))
        tl.store(next_score + source * size + i, tl.where(none, float("-inf"), _number_of(found)))
        tl.store(next_parents + source * size + i, rank % num_hyps)
        tl.store(next_ids + source * size + i, rank // num_hyps)
        candidates = tl.where(candidates == found, _LOWEST, candidates)
