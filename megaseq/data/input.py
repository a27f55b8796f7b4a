"""Input: endless training batches in an order that can be resumed exactly, and whole passes for evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megaseq.base import REQUIRED, Configurable, NestedMap
from megaseq.data.bucketing import Bucketing
from megaseq.data.eval_plan import row_budget, sorted_plan
from megaseq.data.example_order import ExampleOrder
from megaseq.data.examples import Examples
from megaseq.data.mixture import Mixture, components
from megaseq.data.order import num_windows, window_range
from megaseq.data.packing import Packing
from megaseq.data.plan import Batching, Plan
from megaseq.data.prefetch import Prefetcher
from megaseq.data.problem import data_error
from megaseq.data.selection import Limits
from megaseq.data.source import Source
from megaseq.data.vocabulary import Vocabulary
from megaseq.data.window import Window, make_batch

_STATE_FORMAT = 1
_WINDOW_TOKENS = 1 << 23
"""Tokens of a window, about, at most: bounds its memory and the time before its first batch."""
_SAMPLED_WINDOW = 1 << 15
"""Examples of a window where segmentations are drawn: that takes time before the window's first batch."""
_log = logging.getLogger(__name__)


class Position(NamedTuple):
    """A place in the stream of global batches."""

    epoch: int
    window: int
    batch: int


class _Loaded(NamedTuple):
    window: Window
    plan: Plan


class Input(Configurable):
    """Batches of a source or mixture.

    Iterating gives training batches without end. Their order is a pure function of the params, the data and the
    position; ranks take rows of the same global batches, and worker processes and threads only make them earlier. So
    `state_dict` is a few integers, and restoring it is exact on any number of ranks and workers.
    """

    class Params(Configurable.Params):
        source: Source.Params | Mixture.Params = REQUIRED
        """Where the pairs come from."""
        batching: Batching.Params = Packing.Params()
        """How they are put together in batches."""
        seed: int | None = None
        """Of the order of examples, and of segmentations that are drawn; None: the seed of the run."""
        max_source_length: int = 256
        """Longest source in tokens, eos included."""
        max_target_length: int = 256
        """Longest target in tokens, eos included."""
        too_long: Literal["drop", "truncate"] = "drop"
        """What happens to a pair with a longer side; what is dropped is counted and reported."""
        empty: Literal["drop", "keep"] = "drop"
        """What happens to a pair with an empty side; keep them in evaluation, so that scores are those of the set."""
        sample_segmentations: bool = True
        """Whether training batches draw segmentations anew each epoch, where the tokenizer's params ask for it."""
        num_workers: int = 0
        """Processes that make training batches; 0 makes them in this one."""
        prefetch: int = 4
        """Training batches made ahead of the reader, by a thread or for each worker; 0 makes none ahead."""

        def validate(self) -> Iterator[Any]:
            yield from super().validate()
            for name, least in (
                ("max_source_length", 2),
                ("max_target_length", 2),
                ("num_workers", 0),
                ("prefetch", 0),
            ):
                if getattr(self, name) < least:
                    yield f"{name}: must be at least {least}, but is {getattr(self, name)}. Set a larger number."

    params: Params

    def __init__(
        self,
        p: Params,
        *,
        vocabulary: Vocabulary,
        cache_dir: str | Path,
        data_rank: int = 0,
        data_ranks: int = 1,
    ) -> None:
        """Opens the data, building caches that are missing, and reports the pairs that are left out.

        Args:
            p: Params.
            vocabulary: Tokenizes the texts.
            cache_dir: Where text and ids are kept; shared by all processes of a machine.
            data_rank: Which rows of each global batch are this one's.
            data_ranks: Among how many the rows are dealt out.

        Raises:
            DataError: A file is missing or has a bad line, a tag is not reserved, or no pair is left.
        """
        super().__init__(p)
        if not 0 <= data_rank < data_ranks:
            found = f"rank {data_rank} of {data_ranks}"
            raise data_error("Input", "have a data_rank below data_ranks", found, "Check the launcher's settings")
        self.vocabulary = vocabulary
        self._seed = 1 if p.seed is None else p.seed
        self.data_rank, self.data_ranks = data_rank, data_ranks
        limits = Limits(p.max_source_length, p.max_target_length, p.too_long == "truncate", p.empty == "keep")
        parts = components(p.source)
        self._examples = Examples(parts, vocabulary=vocabulary, limits=limits, cache_dir=Path(cache_dir))
        self._batching: Batching = p.batching.instantiate()
        sample = self._examples.sample_lengths()
        self._batching.fit(source_lengths=sample.source, target_lengths=sample.target)
        self._training = self._examples.fitting(
            lambda lengths: self._batching.fits(source_lengths=lengths.source, target_lengths=lengths.target),
            what="have no room in the training batches",
        )
        names, sizes = self._training.names, self._training.sizes
        mixture = p.source.instantiate()
        draws = mixture.draws(sizes) if isinstance(mixture, Mixture) else sizes
        self._order = ExampleOrder(seed=self._seed, names=names, sizes=sizes, draws=draws)
        tokenizers = (vocabulary.source, vocabulary.target)
        self._samples = p.sample_segmentations and any(tokenizer.samples for tokenizer in tokenizers)
        self._window_size = self._choose_window()
        self._position = Position(0, 0, 0)

    def _choose_window(self) -> int:
        """Returns how many examples are planned together: no more than the params say, and so that memory suffices."""
        size = min(self.params.batching.window, max(1024, int(_WINDOW_TOKENS / self._examples.mean_tokens())))
        return min(size, _SAMPLED_WINDOW) if self._samples else size

    @property
    def stats(self) -> dict[str, int]:
        """How many examples there are, and how many are left out of training, by reason."""
        return dict(self._training.stats)

    @property
    def num_examples(self) -> int:
        """Draws in a training epoch."""
        return self._order.size

    @property
    def position(self) -> Position:
        """Where the next training batch stands."""
        return self._position

    # State

    def fingerprint(self) -> str:
        """A hash of all that decides the training batches, but not of ranks, workers and places of files."""
        p = self.params
        parts = (
            _STATE_FORMAT,
            self._training.fingerprint(),
            self._order.fingerprint(),
            type(self._batching).__name__,
            p.batching.to_text(),
            self._window_size,
            self._samples,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch that was read, a few plain values."""
        return {"format": _STATE_FORMAT, "fingerprint": self.fingerprint(), **self._position._asdict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, also of another rank or number of ranks.

        Raises:
            DataError: The data, the tokenizers or the batching are not those of the state.
        """
        own = self.fingerprint()
        if state.get("format") != _STATE_FORMAT or state.get("fingerprint") != own:
            raise data_error(
                "train_input",
                f"be what the checkpoint was trained on, {str(state.get('fingerprint'))[:16]}",
                f"{own[:16]}",
                "Restore the data, the tokenizer, the seed and the batching, or start a new run from the weights",
            )
        self._position = Position(int(state["epoch"]), int(state["window"]), int(state["batch"]))

    # Training

    def __iter__(self) -> Iterator[NestedMap]:
        """Yields training batches from the present position on, without end; see `make_batch` for what is in them."""
        p = self.params
        made: Any
        if p.num_workers:
            made = iter(self._loader())
        elif p.prefetch:
            made = Prefetcher(self._stream(self._position, ahead=True), depth=p.prefetch)
        else:
            made = self._stream(self._position, ahead=False)
        try:
            for batch, following in made:
                self._position = Position(*following)
                yield batch
        finally:
            if isinstance(made, Prefetcher):
                made.close()

    def _loader(self) -> Any:
        return DataLoader(
            _WorkerStream(self, position=self._position),
            batch_size=None,
            num_workers=self.params.num_workers,
            prefetch_factor=max(1, self.params.prefetch),
            collate_fn=_as_it_is,
        )

    def _stream(
        self, position: Position, *, ahead: bool, worker: int = 0, workers: int = 1
    ) -> Iterator[tuple[NestedMap, Position]]:
        """Yields (batch, position of the next) from `position`; of several workers each makes its part, in turns.

        Args:
            position: Where to begin.
            ahead: Whether the next window is loaded in a thread while the present one is read.
            worker: Which of the workers this is.
            workers: How many there are; worker w makes batches w, w + workers, ... counted from `position`.
        """
        epoch, index, first = position
        windows = num_windows(size=self._order.size, window=self._window_size)
        turn = 0
        with ThreadPoolExecutor(max_workers=1) as executor:
            loaded: Future[_Loaded] | None = None
            while True:
                current = loaded.result() if loaded is not None else self._load(epoch, index=index)
                next_epoch, next_index = (epoch, index + 1) if index + 1 < windows else (epoch + 1, 0)
                loaded = executor.submit(self._load, epoch=next_epoch, index=next_index) if ahead else None
                last = current.plan.num_batches - 1
                for batch in range(first, last + 1):
                    if turn % workers == worker:
                        following = Position(epoch, index, batch + 1)
                        if batch == last:
                            following = Position(next_epoch, next_index, 0)
                        yield self._make(current, batch=batch), following
                    turn += 1
                epoch, index, first = next_epoch, next_index, 0

    def _load(self, epoch: int, *, index: int) -> _Loaded:
        """Brings one window into memory and plans its batches."""
        start, stop = window_range(size=self._order.size, window=self._window_size, index=index)
        sources, ranks = self._order.examples(epoch=epoch, start=start, stop=stop)
        numbers = self._training.numbers(sources, ranks=ranks)
        seed = None
        if self._samples:
            text = f"megaseq.segmentations/{self._seed}/{epoch}/{index}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
        window = self._training.window(numbers, sample_seed=seed)
        if seed is not None:
            window = self._back_to_best(window)
        plan = self._batching.plan(
            seed=self._seed,
            epoch=epoch,
            window=index,
            source_lengths=window.source.lengths + 1,
            target_lengths=window.target.lengths + 1,
        )
        return _Loaded(window, plan)

    def _back_to_best(self, window: Window) -> Window:
        """Gives pairs whose drawn segmentations have no room in the batches their best ones, so that none is lost."""
        fits = self._batching.fits(source_lengths=window.source.lengths + 1, target_lengths=window.target.lengths + 1)
        if fits.all():
            return window
        best = self._training.window(window.example_ids, sample_seed=None)
        return Window(
            window.source.replaced(~fits, other=best.source),
            window.target.replaced(~fits, other=best.target),
            window.example_ids,
        )

    def _make(self, loaded: _Loaded, *, batch: int) -> NestedMap:
        return make_batch(
            loaded.window,
            planned=loaded.plan.batch(batch).shard(rank=self.data_rank, ranks=self.data_ranks),
            source=self.vocabulary.source,
            target=self.vocabulary.target,
            with_example_ids=isinstance(self._batching, Bucketing),
        )

    # Evaluation

    def epoch_batches(self, *, max_rows: int | None = None) -> Iterator[NestedMap]:
        """Yields every example once, one a row, the longest first within a window; for evaluation and decoding.

        Segmentations are the best ones, and pairs that only the training batches have no room for are there. Batches
        have as many tokens as training batches. All ranks yield equally many, some perhaps with empty rows.

        Args:
            max_rows: Rows of a global batch at most.
        """
        budget = row_budget(self._batching)
        total = sum(self._examples.sizes)
        for index in range(num_windows(size=total, window=self._window_size)):
            start, stop = window_range(size=total, window=self._window_size, index=index)
            window = self._examples.window(self._examples.kept_numbers(start, stop=stop), sample_seed=None)
            plan = sorted_plan(
                source_lengths=window.source.lengths + 1,
                target_lengths=window.target.lengths + 1,
                max_tokens=budget,
                max_rows=max_rows,
            )
            for planned in plan.batches():
                yield make_batch(
                    window,
                    planned=planned.shard(rank=self.data_rank, ranks=self.data_ranks),
                    source=self.vocabulary.source,
                    target=self.vocabulary.target,
                    with_example_ids=True,
                )

    @property
    def num_eval_examples(self) -> int:
        """How many examples `epoch_batches` yields on all ranks together."""
        return sum(self._examples.sizes)

    def texts(self, example_ids: Any) -> tuple[list[str], list[str]]:
        """Returns the source texts, tags included, and the reference texts of `example_ids` [rows], without -1."""
        numbers = np.asarray(example_ids, dtype=np.int64).reshape(-1)
        return self._examples.texts(numbers[numbers >= 0])

    def location(self, example_id: int) -> str:
        """Returns `file:line` of an example."""
        return self._examples.location(example_id)


class _WorkerStream(IterableDataset[Any]):
    """What a worker process runs: its part of the stream."""

    def __init__(self, owner: Input, *, position: Position) -> None:
        self._owner, self._position = owner, position

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return self._owner._stream(self._position, ahead=False, worker=worker, workers=workers)


def _as_it_is(item: Any) -> Any:
    return item
