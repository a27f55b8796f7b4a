"""Bucketing: pairs of about the same length share a batch, one pair per row.

`bucket_upper_bound` and `bucket_batch_limit` mean what they mean in Lingvo: a pair goes in the first bucket whose bound
is at least its key, a bucket that holds `bucket_batch_limit` pairs is a batch, and a pair longer than the last bound is
dropped and counted. `max_tokens` is fairseq's limit instead: rows times padded length of each batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from megaseq.base import Problem
from megaseq.data.order import Int64Array, permute
from megaseq.data.plan import Batching, Lengths, Plan, sample_evenly

MAX_BINS = 500
"""Distinct lengths that the search for bounds looks at; more are merged, as its time grows with their square."""


def bucket_keys(*, source_lengths: Lengths, target_lengths: Lengths, key: str) -> Int64Array:
    """Returns the length that chooses each example's bucket, [examples]."""
    if key == "source":
        return source_lengths.astype(np.int64)
    if key == "target":
        return target_lengths.astype(np.int64)
    return np.maximum(source_lengths, target_lengths).astype(np.int64)


def choose_bounds(*, keys: Int64Array, num_buckets: int, longest: int) -> tuple[int, ...]:
    """Returns the ascending bounds that minimise padding, `num_buckets` of them at most; the last is `longest`.

    Dynamic programming over the histogram of the keys: the cost of a bucket is its bound times its examples, and the
    best split of the first j bins in k buckets extends a best split of fewer bins in k - 1. With more than `MAX_BINS`
    different lengths, neighbours are merged to bins of about equal count, which bounds the time.

    Args:
        keys: Lengths, [examples]; those above `longest` are ignored.
        num_buckets: Most buckets wanted.
        longest: The last bound.
    """
    counts = np.bincount(keys[keys <= longest], minlength=longest + 1)
    bounds = np.flatnonzero(counts)
    if len(bounds) > MAX_BINS:
        quantiles = np.cumsum(counts[bounds]) * MAX_BINS // counts.sum()
        last_of_bin = np.append(np.flatnonzero(np.diff(quantiles)), len(bounds) - 1)
        bounds = bounds[last_of_bin]
    if not len(bounds) or bounds[-1] != longest:
        bounds = np.append(bounds, longest)
    cumulative = np.concatenate([[0], np.cumsum(counts)[bounds]]).astype(np.float64)
    bins = len(bounds)
    # cost[i, j]: tokens of one bucket of bins i to j, padding included.
    cost = bounds[None, :] * (cumulative[None, 1:] - cumulative[:-1, None])
    cost[np.tril_indices(bins, -1)] = np.inf
    best = cost[0]
    cuts: list[Int64Array] = []
    for _ in range(1, min(num_buckets, bins)):
        # Bins up to i - 1 in the buckets so far, bins i to j in one more; i = 0 keeps one bucket fewer.
        extended = np.concatenate([[0.0], best[:-1]])[:, None] + cost
        cuts.append(extended.argmin(axis=0))
        best = extended.min(axis=0)
    chosen = []
    last = bins - 1
    for cut in reversed(cuts):
        chosen.append(int(bounds[last]))
        last = int(cut[last]) - 1
        if last < 0:
            return tuple(reversed(chosen))
    chosen.append(int(bounds[last]))
    return tuple(reversed(chosen))


class Bucketing(Batching):
    """Batches of pairs of like length; one pair per row, so the shape differs from batch to batch."""

    class Params(Batching.Params):
        """Buckets, and how many examples make a batch."""

        bucket_upper_bound: tuple[int, ...] = ()
        """Ascending longest keys of the buckets, in tokens; empty takes `num_buckets` bounds from the corpus."""
        bucket_batch_limit: tuple[int, ...] = ()
        """Examples of a batch of each bucket; one number holds for all. Empty with `max_tokens`."""
        max_tokens: int | None = None
        """Padded tokens of a batch at most: rows times the longest of source and target rows. For empty limits."""
        multiple_of: int = 1
        """Limits that come from `max_tokens` are rounded down to a multiple of this: the data-parallel ranks."""
        num_buckets: int = 16
        """Bounds to choose where `bucket_upper_bound` is empty, so that padding is least."""
        max_length: int = 256
        """The last of the bounds that are chosen; an example with a longer key is dropped and counted."""
        bucket_key: Literal["max", "source", "target"] = "max"
        """The length that chooses the bucket: the longer one, or that of one side."""
        pad_to_bound: bool = False
        """Pads to the bucket's bound, so that there are few shapes, instead of to the batch's longest rows."""

        def validate(self) -> Iterator[Problem | str]:
            """Yields what contradicts itself."""
            yield from super().validate()
            for name in ("window", "num_buckets", "max_length", "multiple_of"):
                if getattr(self, name) < 1:
                    yield Problem(
                        path=name, rule="be at least 1", value=getattr(self, name), remedy="Set a positive number."
                    )
            yield from self._contradictions()

        def _contradictions(self) -> Iterator[Problem]:
            bounds, limits, max_tokens = self.bucket_upper_bound, self.bucket_batch_limit, self.max_tokens
            if any(bound < 1 for bound in bounds) or any(a >= b for a, b in itertools.pairwise(bounds)):
                yield Problem(
                    path="bucket_upper_bound",
                    rule="ascend from at least 1",
                    value=bounds,
                    remedy="Sort it, drop what is twice.",
                )
            if bool(limits) == (max_tokens is not None):
                rule, remedy = f"be set where max_tokens (now {max_tokens}) is not", "Set one of the two."
                yield Problem(path="bucket_batch_limit", rule=rule, value=limits, remedy=remedy)
            if any(limit < 1 for limit in limits):
                yield Problem(
                    path="bucket_batch_limit", rule="be at least 1", value=limits, remedy="Set positive numbers."
                )
            if len(limits) > 1 and len(limits) != len(bounds):
                rule = f"have one number, or one for each of the {len(bounds)} in bucket_upper_bound"
                yield Problem(
                    path="bucket_batch_limit",
                    rule=rule,
                    value=limits,
                    remedy="Give as many limits as bounds, or one for all.",
                )
            if max_tokens is not None and max_tokens < 1:
                yield Problem(
                    path="max_tokens", rule="be at least 1", value=max_tokens, remedy="Set a positive number."
                )
            if self.bucket_key != "max" and (self.pad_to_bound or max_tokens is not None):
                rule = "be max with pad_to_bound or max_tokens, as the other side may be longer than the bound"
                yield Problem(
                    path="bucket_key", rule=rule, value=self.bucket_key, remedy="Set it to max, or those two off."
                )

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.bounds: tuple[int, ...] = p.bucket_upper_bound or (p.max_length,)

    def fit(self, *, source_lengths: Lengths, target_lengths: Lengths) -> None:
        """Chooses the bounds from the corpus' lengths where the params leave them open."""
        p = self.params
        if not p.bucket_upper_bound:
            source, target = sample_evenly(source_lengths), sample_evenly(target_lengths)
            keys = bucket_keys(source_lengths=source, target_lengths=target, key=p.bucket_key)
            self.bounds = choose_bounds(keys=keys, num_buckets=p.num_buckets, longest=p.max_length)

    @property
    def batch_limits(self) -> tuple[int, ...]:
        """Examples of a full batch, for each bucket."""
        p = self.params
        if p.max_tokens is None:
            return p.bucket_batch_limit if len(p.bucket_batch_limit) > 1 else p.bucket_batch_limit * len(self.bounds)
        whole = (p.max_tokens // bound // p.multiple_of * p.multiple_of for bound in self.bounds)
        return tuple(max(p.multiple_of, limit) for limit in whole)

    def fits(self, *, source_lengths: Lengths, target_lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Returns which examples have a bucket."""
        keys = bucket_keys(source_lengths=source_lengths, target_lengths=target_lengths, key=self.params.bucket_key)
        fits: npt.NDArray[np.bool_] = keys <= self.bounds[-1]
        return fits

    def plan(self, *, seed: int, epoch: int, window: int, source_lengths: Lengths, target_lengths: Lengths) -> Plan:
        """Fills the buckets in the epoch's order; what is left in them at the window's end makes smaller batches."""
        p = self.params
        keys = bucket_keys(source_lengths=source_lengths, target_lengths=target_lengths, key=p.bucket_key)
        buckets = np.searchsorted(np.asarray(self.bounds), keys, side="left").astype(np.int16)
        # A stable sort keeps the epoch's order within each bucket; NumPy sorts 16-bit numbers by radix.
        examples = np.argsort(buckets, kind="stable").astype(np.int64)
        counts = np.bincount(buckets, minlength=len(self.bounds) + 1)
        sizes, bucket_of = _split(counts[:-1], np.asarray(self.batch_limits, dtype=np.int64))
        starts = np.cumsum(sizes) - sizes
        order = permute(seed=seed, epoch=epoch, stream=f"batches/{window}", size=len(sizes))
        starts, sizes, bucket_of = starts[order], sizes[order], bucket_of[order]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        kept = examples[np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])]
        if p.pad_to_bound or not len(sizes):
            source = target = np.asarray(self.bounds, dtype=np.int64)[bucket_of]
        else:
            source = np.maximum.reduceat(source_lengths[kept].astype(np.int64), offsets[:-1])
            target = np.maximum.reduceat(target_lengths[kept].astype(np.int64), offsets[:-1])
        return Plan(
            batch_offsets=offsets,
            row_offsets=np.arange(len(kept) + 1, dtype=np.int64),
            examples=kept,
            num_rows=sizes,
            source_lengths=source,
            target_lengths=target,
            dropped=examples[len(kept) :],
        )


def _split(counts: Int64Array, limits: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Splits each bucket's examples in batches of its limit and a rest: their sizes and their buckets."""
    batches = -(-counts // limits)
    bucket_of = np.repeat(np.arange(len(counts)), batches)
    sizes = limits[bucket_of]
    last = np.cumsum(batches) - 1
    filled = batches > 0
    sizes[last[filled]] = (counts - (batches - 1) * limits)[filled]
    return sizes, bucket_of
