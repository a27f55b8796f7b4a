"""The examples of an input: the texts, ids and selections of all its sources, gathered by number."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaseq.data.cache import TokenCache, id_type
from megaseq.data.columns import Column
from megaseq.data.mixture import Component
from megaseq.data.order import Int64Array
from megaseq.data.problem import data_error
from megaseq.data.selection import NUM_SHOWN, Lengths, Limits, Mask, Selection, lengths_of, misfits, screen
from megaseq.data.text_store import TextStore
from megaseq.data.tokenizer import Tokenizer
from megaseq.data.vocabulary import Vocabulary
from megaseq.data.window import Side, Window

_FIT_SAMPLE = 1 << 22
_log = logging.getLogger(__name__)


class _Opened(NamedTuple):
    """One source: `first` is the number of its first example in the input."""

    name: str
    texts: TextStore
    tokens: TokenCache
    first: int
    selection: Selection


class Examples:
    """All examples of an input, numbered from 0 through its sources in order; reads nothing whole into memory."""

    def __init__(
        self, components: Sequence[Component], *, vocabulary: Vocabulary, limits: Limits, cache_dir: Path
    ) -> None:
        """Opens the caches, building what is missing, and looks at all lengths.

        Raises:
            DataError: A file is missing or has a bad line, a tag is not reserved, or no example is left.
        """
        self.vocabulary = vocabulary
        self.limits = limits
        self.stats: dict[str, int] = {"examples": 0, "dropped_empty": 0, "dropped_too_long": 0, "dropped_unbatched": 0}
        self._sources: list[_Opened] = []
        first = 0
        for name, source in components:
            _check_tag(source.params.tag, tokenizer=vocabulary.source)
            texts = TextStore.open(source, cache_dir=cache_dir)
            tokens = TokenCache.open(texts, vocabulary=vocabulary, cache_dir=cache_dir)
            found = screen(tokens.source, target=tokens.target, limits=limits, num_tags=len(source.params.tag.split()))
            self._sources.append(_Opened(name, texts, tokens, first, Selection(len(texts), dropped=found.dropped)))
            self._report(texts, key="dropped_empty", what="have an empty side", indices=found.empty)
            beyond = f"are longer than {limits.max_source_length} or {limits.max_target_length} tokens"
            self._report(texts, key="dropped_too_long", what=beyond, indices=found.too_long)
            first += len(texts)
        self.stats["examples"] = first
        self._check_any()

    def _report(self, texts: TextStore, *, key: str, what: str, indices: Int64Array) -> None:
        if not len(indices):
            return
        self.stats[key] += len(indices)
        places = ", ".join(texts.location(int(index)) for index in indices[:NUM_SHOWN])
        more = ", ..." if len(indices) > NUM_SHOWN else ""
        _log.warning("%d of %d pairs %s and are left out: %s%s", len(indices), len(texts), what, places, more)

    def _check_any(self) -> None:
        if not any(self.sizes):
            where = ", ".join(opened.texts.location(0).rpartition(":")[0] for opened in self._sources)
            left_out = ", ".join(f"{key} {value}" for key, value in self.stats.items() if value)
            raise data_error(where, "leave at least one pair", f"none ({left_out})", "Raise the limits on lengths")

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [opened.name for opened in self._sources]

    @property
    def sizes(self) -> list[int]:
        """How many examples of each source take part."""
        return [len(opened.selection) for opened in self._sources]

    @property
    def total(self) -> int:
        """How many examples there are, those left out included."""
        return self.stats["examples"]

    def fingerprint(self) -> str:
        """A hash of the ids of all examples, and of which take part."""
        parts = [(opened.name, opened.tokens.key, len(opened.selection)) for opened in self._sources]
        return hashlib.sha256(repr((parts, tuple(self.limits))).encode()).hexdigest()

    def sample_lengths(self) -> Lengths:
        """Returns the lengths of the examples that take part, or of very many of them, evenly spaced."""
        parts = []
        share = max(1, -(-sum(self.sizes) // _FIT_SAMPLE))
        for opened in self._sources:
            ranks = np.arange(0, len(opened.selection), share, dtype=np.int64)
            indices = opened.selection.indices(ranks)
            parts.append(
                lengths_of(opened.tokens.source, target=opened.tokens.target, indices=indices, limits=self.limits)
            )
        return Lengths(np.concatenate([part.source for part in parts]), np.concatenate([part.target for part in parts]))

    def fitting(self, fits: Callable[[Lengths], Mask], *, what: str) -> Examples:
        """Returns the same examples without those that `fits` refuses, which are counted and reported as `what`."""
        other = object.__new__(Examples)
        other.vocabulary, other.limits, other.stats = self.vocabulary, self.limits, dict(self.stats)
        other._sources = []
        for opened in self._sources:
            before = opened.selection.dropped
            refused = misfits(
                opened.tokens.source, target=opened.tokens.target, limits=self.limits, dropped=before, fits=fits
            )
            other._report(opened.texts, key="dropped_unbatched", what=what, indices=refused)
            selection = Selection(len(opened.texts), dropped=np.union1d(before, refused))
            other._sources.append(opened._replace(selection=selection))
        other._check_any()
        return other

    def kept_numbers(self, start: int, *, stop: int) -> Int64Array:
        """Returns the numbers of those examples from `start` to `stop`, counted over those that take part, in order."""
        parts, passed = [], 0
        for opened in self._sources:
            size = len(opened.selection)
            ranks = np.arange(max(0, start - passed), min(size, stop - passed), dtype=np.int64)
            parts.append(opened.first + opened.selection.indices(ranks))
            passed += size
        return np.concatenate(parts)

    def numbers(self, sources: Int64Array, *, ranks: Int64Array) -> Int64Array:
        """Returns the numbers of examples given by source and rank among those of the source that take part."""
        result = np.empty(len(ranks), dtype=np.int64)
        for k, opened in enumerate(self._sources):
            mine = np.flatnonzero(sources == k)
            result[mine] = opened.first + opened.selection.indices(ranks[mine])
        return result

    def window(self, numbers: Int64Array, *, sample_seed: int | None) -> Window:
        """Brings the examples `numbers` into memory.

        Args:
            numbers: Numbers of examples, [examples].
            sample_seed: Where a tokenizer samples, segmentations are drawn with it: a pure function of (numbers, seed).
                One that is longer than the limits gives way to the best segmentation.
        """
        sides = []
        for name, tokenizer, limit in (
            ("source", self.vocabulary.source, self.limits.max_source_length),
            ("target", self.vocabulary.target, self.limits.max_target_length),
        ):
            side = self._gather(numbers, name=name, tokenizer=tokenizer)
            if sample_seed is not None and tokenizer.samples:
                # The two sides must not share their random numbers where they share a tokenizer.
                seed = int.from_bytes(hashlib.blake2b(f"{sample_seed}/{name}".encode(), digest_size=4).digest())
                side = self._sample(numbers, name=name, tokenizer=tokenizer, best=side, seed=seed, limit=limit)
            sides.append(side._replace(lengths=np.minimum(side.lengths, limit - 1)))
        return Window(sides[0], sides[1], numbers)

    def _each(self, numbers: Int64Array) -> list[tuple[_Opened, Int64Array, Int64Array]]:
        """Splits by source: for each that occurs, the places in `numbers` and the indices in the source."""
        firsts = np.array([opened.first for opened in self._sources], dtype=np.int64)
        source_of = np.searchsorted(firsts, numbers, side="right") - 1
        split = []
        for k, opened in enumerate(self._sources):
            places = np.flatnonzero(source_of == k)
            if len(places):
                split.append((opened, places, numbers[places] - opened.first))
        return split

    def _gather(self, numbers: Int64Array, *, name: str, tokenizer: Tokenizer) -> Side:
        starts, lengths = np.zeros(len(numbers), dtype=np.int64), np.zeros(len(numbers), dtype=np.int64)
        pieces: list[Any] = [np.empty(0, dtype=id_type(tokenizer))]
        end = 0
        for opened, places, indices in self._each(numbers):
            column: Column = getattr(opened.tokens, name)
            ids, sizes = column.gather(indices)
            lengths[places] = sizes
            starts[places] = end + np.cumsum(sizes) - sizes
            end += len(ids)
            pieces.append(ids)
        return Side(pieces[1] if len(pieces) == 2 else np.concatenate(pieces), starts, lengths)

    def _sample(
        self, numbers: Int64Array, *, name: str, tokenizer: Tokenizer, best: Side, seed: int, limit: int
    ) -> Side:
        texts = self.texts(numbers)[0 if name == "source" else 1]
        drawn = tokenizer.encode_batch(texts, seed=seed)
        lengths = np.array([len(ids) for ids in drawn], dtype=np.int64)
        ids = np.concatenate([best.ids, *drawn]).astype(best.ids.dtype)
        starts = len(best.ids) + np.cumsum(lengths) - lengths
        fits = (lengths > 0) & (lengths < limit)
        return Side(ids, np.where(fits, starts, best.starts), np.where(fits, lengths, best.lengths))

    def texts(self, numbers: Int64Array) -> tuple[list[str], list[str]]:
        """Returns the source and target texts of examples `numbers`."""
        sources, targets = [""] * len(numbers), [""] * len(numbers)
        for opened, places, indices in self._each(numbers):
            for place, source, target in zip(places.tolist(), *opened.texts.read(indices), strict=True):
                sources[place], targets[place] = source, target
        return sources, targets

    def location(self, number: int) -> str:
        """Returns `file:line` of an example."""
        opened, _, indices = self._each(np.array([number], dtype=np.int64))[0]
        return opened.texts.location(int(indices[0]))

    def mean_tokens(self) -> float:
        """Returns the mean number of tokens of a pair, both sides with eos, over all examples."""
        tokens = sum(len(opened.tokens.source.values) + len(opened.tokens.target.values) for opened in self._sources)
        return 2.0 + tokens / max(1, self.total)


def _check_tag(tag: str, *, tokenizer: Tokenizer) -> None:
    for piece in tag.split():
        if piece not in tokenizer.params.tags:
            known = ", ".join(tokenizer.params.tags) or "no tags"
            remedy = "Add it to the source tokenizer's tags"
            raise data_error(f"source tag {tag}", "be reserved in the source tokenizer", f"not among {known}", remedy)
