"""The checkpointer of a run: when and what to save, what to keep, and where to go on from."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megaseq.base import Configurable, Problem
from megaseq.base.errors import CheckpointError
from megaseq.checkpoint import directory as directories
from megaseq.checkpoint.average import Weights, average, newest
from megaseq.checkpoint.manifest import DamagedError
from megaseq.checkpoint.piece import Outline, Part, Piece, as_pieces
from megaseq.checkpoint.ranks import Ranks
from megaseq.checkpoint.reading import Restored, load_checkpoint
from megaseq.checkpoint.retention import MetricHistory, steps_to_delete
from megaseq.checkpoint.staging import Room, Stager
from megaseq.checkpoint.tiling import deal_out
from megaseq.checkpoint.writing import Content, WriterThread, encode_state, write_checkpoint

logger = logging.getLogger(__name__)


class Checkpointer(Configurable):
    """Saves to and restores from `RUN/checkpoints/step_00001000/`.

    A checkpoint is written to a temporary name, flushed to the disk and renamed, so whatever is killed at whatever
    time, the ones before stay usable. One run writes to a directory, each of its ranks some of the files; any number
    of processes may read. Nothing in it depends on how the run was laid out over its ranks.
    """

    class Params(Configurable.Params):
        interval_steps: int = 1000
        """A checkpoint is due every so many steps; 0 is never."""
        asynchronous: bool = True
        """Whether training goes on while a copy of the tensors is written."""
        keep_last: int = 3
        """So many of the newest are kept; 0 keeps all."""
        keep_every_steps: int = 0
        """Checkpoints at multiples of this are kept for good; 0 is none."""
        keep_best: int = 1
        """So many of the best by `best_metric` are kept."""
        best_metric: str | None = None
        """Name of the metric that says which is best; None keeps none for its metric."""
        best_mode: Literal["max", "min"] = "max"
        """Whether the highest or the lowest is best."""
        check_finite: bool = True
        """Whether a nan or inf in a tensor makes the save fail, so that good checkpoints are not rotated away."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports negative counts."""
            yield from super().validate()
            for name in ("interval_steps", "keep_last", "keep_every_steps", "keep_best"):
                if getattr(self, name) < 0:
                    yield f"{name}: must be at least 0, but is {getattr(self, name)}. Use 0 to turn it off."

    params: Params

    def __init__(
        self,
        p: Params,
        *,
        directory: str | os.PathLike[str],
        read_only: bool = False,
        ranks: Ranks | None = None,
        layout: str = "",
        room: Room | None = None,
    ) -> None:
        """Prepares saving to and restoring from `directory`, which need not exist.

        Args:
            p: The checkpointer's params.
            directory: With the checkpoints, usually RUN/checkpoints; on a file system that all ranks share.
            read_only: For processes beside those that train: never writes, deletes or cleans.
            ranks: That save and restore together: all of them call `save`, `wait` and `restore`, each with its
                pieces. None is this process alone.
            layout: How the run is laid out over its ranks, kept in the manifest for people.
            room: Where copies of the tensors lie while they are written; None is host memory.
        """
        super().__init__(p)
        self.directory = Path(directory)
        self.read_only = read_only
        self.ranks = ranks or Ranks(alone=True)
        self._layout = layout
        self.stall_seconds = 0.0
        """How long the last `save` kept the caller: waiting for the one before, and copying (or all of the writing)."""
        self.total_stall_seconds = 0.0
        self._writer = WriterThread()
        self._stager = Stager(room)
        self._lock = threading.Lock()
        self._damaged: set[int] = set()
        self._last_saved: int | None = None
        self._outlines: list[Outline] = []
        self._chosen: list[int] = []
        self._writes = not read_only and self.ranks.is_first
        if self._writes:
            for name in directories.clean(self.directory):
                logger.warning("%s: removed, left over from a process that was stopped.", self.directory / name)
        self._history = MetricHistory(self.directory)

    def path(self, step: int) -> Path:
        """Returns where the checkpoint of `step` is, or would be."""
        return self.directory / directories.step_name(step)

    def list_steps(self) -> list[int]:
        """Returns the steps with a checkpoint, in order."""
        return directories.list_steps(self.directory)

    def latest(self) -> int | None:
        """Returns the newest step with a checkpoint, or None."""
        steps = self.list_steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """Returns the step with the best value of `best_metric` that still has a checkpoint, or None."""
        best = self._best(self.list_steps(), count=1)
        return best[0] if best else None

    def _best(self, steps: Sequence[int], *, count: int) -> list[int]:
        p = self.params
        if p.best_metric is None or count == 0:
            return []
        return self._history.best(metric=p.best_metric, mode=p.best_mode, steps=steps, count=count)

    def should_save(self, step: int) -> bool:
        """Says whether a checkpoint is due after `step` steps; never twice for the same step."""
        interval = self.params.interval_steps
        return interval > 0 and step > 0 and step % interval == 0 and step != self._last_saved

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor] | Sequence[Piece],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves a checkpoint; an asynchronous one is committed later, its error raised by the next call or `wait`.

        An error of one rank is raised on all.

        Args:
            step: How many steps over the data are done.
            tensors: Whole ones by logical name, or this rank's pieces; they may change as soon as this returns.
            state: JSON values; those of rank 0 are saved, like its files and metrics.
            files: Extra files by relative path.
            metrics: Of this step; more can follow by `record_metrics`.
            wait: Whether to return only when it is on the disk, as before the end of a process.

        Raises:
            CheckpointError: When this save, or the one before it, could not be written.
        """
        if self.read_only:
            raise CheckpointError(
                f"{self.directory}: must be opened for writing to save, but is read-only. Save in the trainer."
            )
        started = time.perf_counter()
        try:
            self._writer.wait()
            encoded = self.ranks.together(lambda: encode_state(state))
            own = self._own(as_pieces(tensors))
            content = Content(
                step=step,
                parts=[Part.of(piece) for piece in own],
                state=encoded,
                files=dict(files or {}),
                metrics=dict(metrics or {}),
                layout=self._layout,
            )
            if self.params.asynchronous and not wait:
                staged = self.ranks.together(lambda: self._stager.stage(own))
                content = replace(content, parts=[Part.of(piece) for piece in staged])
                self._writer.start(lambda: self._write(content))
            else:
                self._write(content)
            self._last_saved = step
        finally:
            self.stall_seconds = time.perf_counter() - started
            self.total_stall_seconds += self.stall_seconds

    def _own(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Returns those of this rank's pieces that it writes; they are dealt out anew only when some rank's change."""
        pieces = [piece for piece in pieces if not piece.is_copy]
        outlines = [Outline.of(piece) for piece in pieces]
        if any(self.ranks.gather(outlines != self._outlines)):
            gathered = self.ranks.gather(outlines)
            self._chosen = self.ranks.on_first(lambda: deal_out(gathered))[self.ranks.rank]
            self._outlines = outlines
        return [pieces[index] for index in self._chosen]

    def _write(self, content: Content) -> None:
        write_checkpoint(
            self.path(content.step), content=content, check_finite=self.params.check_finite, ranks=self.ranks
        )
        if not self._writes:
            return
        with self._lock:
            self._damaged.discard(content.step)
            self._history.record(step=content.step, metrics=content.metrics)
            self._delete_old()

    def record_metrics(self, *, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics that came after the save of `step`; they count for `best`. Rank 0's are kept."""
        if not self._writes:
            return
        with self._lock:
            self._history.record(step=step, metrics=metrics)

    def _delete_old(self) -> None:
        p = self.params
        steps = self.list_steps()
        doomed = steps_to_delete(
            steps,
            keep_last=p.keep_last,
            keep_every=p.keep_every_steps,
            best=self._best(steps, count=p.keep_best),
            damaged=self._damaged,
        )
        for step in doomed:
            directories.delete(self.directory, step=step)

    def wait(self) -> None:
        """Waits until what was saved is on the disk; raises the error if it could not be written."""
        self._writer.wait()

    def restore(
        self,
        *,
        step: int | None = None,
        tensors: Mapping[str, Tensor] | Sequence[Piece] | None = None,
        prefixes: Sequence[str] | None = None,
    ) -> Restored:
        """Loads the newest usable checkpoint, or exactly the one of `step`; the same on all ranks.

        One that is not whole is passed over, with a line in `Restored.messages`; nothing of it is loaded.

        Args:
            step: Which one; None is the newest.
            tensors: Loaded in place, whole ones by name or this rank's pieces; None returns new ones.
            prefixes: Only tensors whose names start with one of these; None is all.

        Raises:
            CheckpointError: When there is none, none is whole, or it is of another model.
        """
        self.wait()
        if step is not None:
            return load_checkpoint(self.path(step), tensors=tensors, prefixes=prefixes, ranks=self.ranks)
        messages: list[str] = []
        tried: set[int] = set()
        # The list is read again each time: the trainer beside us may delete one while we read it.
        while remaining := [found for found in self.ranks.on_first(self.list_steps) if found not in tried]:
            newest = remaining[-1]
            tried.add(newest)
            try:
                restored = load_checkpoint(self.path(newest), tensors=tensors, prefixes=prefixes, ranks=self.ranks)
            except DamagedError as error:
                self._damaged.add(newest)
                messages.append(str(error))
                continue
            return replace(restored, messages=tuple(messages))
        if messages:
            raise CheckpointError(
                f"{self.directory}: must have a whole checkpoint, but all {len(messages)} are damaged. First: "
                f"{messages[0]}"
            )
        raise CheckpointError(f"{self.directory}: must have a checkpoint to restore, but has none. Check the path.")

    def average(self, *, last: int, weights: Weights = "auto") -> dict[str, Tensor]:
        """Returns the mean of the parameters of the `last` newest checkpoints; see `average.average`."""
        self.wait()
        return average(newest(self.directory, count=last), weights=weights)
