"""Dropout as a Triton kernel: the bits of `reference.hashes`, computed where they are needed."""

from __future__ import annotations

from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.dropout import reference
from megaseq.kernels.dropout.configs import default
from megaseq.kernels.triton_runtime import tl, triton

STRIDE = tl.constexpr(reference.STRIDE)
FIRST_MULTIPLIER = tl.constexpr(reference.FIRST_MULTIPLIER)
SECOND_MULTIPLIER = tl.constexpr(reference.SECOND_MULTIPLIER)
FIRST_HIGH_MULTIPLIER = tl.constexpr(reference.FIRST_HIGH_MULTIPLIER)
SECOND_HIGH_MULTIPLIER = tl.constexpr(reference.SECOND_HIGH_MULTIPLIER)
HIGH_STRIDE = tl.constexpr(reference.HIGH_STRIDE)


@triton.jit
def times(word, factor):
    """The low 32 bits of a product; that it wraps is meant."""
    return tl.mul(word, factor, sanitize_overflow=False)


@triton.jit
def plus(word, other):
    """The low 32 bits of a sum."""
    return tl.add(word, other, sanitize_overflow=False)


@triton.jit
def mixed_high(high):
    """What 2^32 elements have in common: `high` is the key's high word plus the stride times that of the index."""
    high = times(high ^ (high >> 16), FIRST_HIGH_MULTIPLIER)
    high = times(high ^ (high >> 13), SECOND_HIGH_MULTIPLIER)
    return high ^ (high >> 16)


@triton.jit
def hash_of(word, high):
    """The hash: `word` is the key's low word plus the stride times that of the index, `high` as of `mixed_high`."""
    word = times(word ^ (word >> 16) ^ high, FIRST_MULTIPLIER)
    return times(word ^ (word >> 15), SECOND_MULTIPLIER)


@triton.jit
def hashes(index, key_low, key_high):
    """The 32-bit hash of each of the elements `index` (int64); the halves of the key are int32, by their bits."""
    high = plus(times((index >> 32).to(tl.uint32), HIGH_STRIDE), key_high.to(tl.uint32, bitcast=True))
    word = plus(times(index.to(tl.uint32), STRIDE), key_low.to(tl.uint32, bitcast=True))
    return hash_of(word, mixed_high(high))


@triton.jit(do_not_specialize=["start", "key_low", "key_high", "threshold"])
def dropout_kernel(
    VALUES,
    RESIDUAL,
    OUT,
    RUNS,
    start,
    key_low,
    key_high,
    threshold,
    scale,
    width,
    blocks,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one run: zero where the hash is below the threshold, scaled elsewhere, plus the residual."""
    program = tl.program_id(0).to(tl.int64)
    run = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = run * width + column
    first = tl.load(RUNS + run) if HAS_RUNS else start
    kept = hashes(first + column, key_low, key_high) >= threshold.to(tl.uint32, bitcast=True)
    values = tl.load(VALUES + place, mask=inside, other=0.0)
    # Rounded before the sum, as the reference rounds.
    dropped = tl.where(kept, values.to(tl.float32) * scale, 0.0).to(values.dtype)
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + place, mask=inside, other=0.0)
        dropped = (dropped.to(tl.float32) + residual.to(tl.float32)).to(OUT.dtype.element_ty)
    tl.store(OUT + place, dropped, mask=inside)


@triton_runtime.on_its_device
def launch(
    values: Tensor,
    *,
    residual: Tensor | None,
    out: Tensor,
    runs: Tensor | None,
    start: int,
    key: int,
    threshold: int,
    scale: float,
) -> None:
    """Writes `out`, which like all others is contiguous.

    Args:
        values: any shape.
        residual: the same shape, or None.
        out: the same shape, in the wider dtype of both.
        runs: int64 [R], where each of R runs starts; None: `start` is where all of it does.
        start: number of the first element.
        key: 64 bits, with a sign or without.
        threshold: hashes below it are dropped.
        scale: factor of what is kept.
    """
    count = values.numel()
    if count == 0:
        return
    width = count if runs is None else count // runs.numel()
    found = triton_runtime.config("dropout", key=triton_runtime.kind_of(values.dtype), default=default(width))
    # Fused, the product and the sum would be rounded once, and the bits would not be the reference's.
    arguments = found.arguments(fused=False)
    # Runs may be shorter than the block that suits long ones.
    arguments["BLOCK"] = min(arguments["BLOCK"], triton.next_power_of_2(width))
    blocks = triton.cdiv(width, arguments["BLOCK"])
    dropout_kernel[(blocks * (count // width),)](
        values,
        values if residual is None else residual,
        out,
        values if runs is None else runs,
        start,
        _signed(key),
        _signed(key >> 32),
        _signed(threshold),
        scale,
        width,
        blocks,
        HAS_RESIDUAL=residual is not None,
        HAS_RUNS=runs is not None,
        **arguments,
    )


def _signed(word: int) -> int:
    """The int32 that has the low 32 bits of `word`: every key then is of one type, and compiled once."""
    return ((word & reference.WORD) ^ 0x80000000) - 0x80000000
