"""What a run's checkpoint holds, and how it is restored: for training on, and for evaluation and decoding alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.base.errors import AsText, CheckpointError, must
from megaseq.checkpoint import Checkpointer, OpenCheckpoint, Ranks
from megaseq.data.vocabulary import Vocabulary
from megaseq.tasks.base import BaseTask
from megaseq.train import parts
from megaseq.train.device import move, resolve_device
from megaseq.train.engine import Engine, named_state
from megaseq.train.experiment import Run
from megaseq.train.precision import autocast, lower_precision, resolve_precision
from megaseq.train.run_dir import RunDirectory, read_run_params

PARAMS_FILE = "params.yaml"
_AVERAGE_PREFIX = "ema."


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands besides its tensors; all values are JSON."""

    step: int
    """Optimiser steps done."""
    data: Mapping[str, Any]
    """State of the training input: the next batch."""
    meter: Mapping[str, Any]
    """Figures summed since the last logged line."""
    early_stop: Mapping[str, Any]
    """Best watched figure so far."""
    pending: Mapping[str, float] | None = None
    """Not None: a signal interrupted the evaluation or decoding after the step; what figures there were."""


class Saver:
    """Saves and restores a run that trains; every rank calls the same of it, and gets the same answers."""

    def __init__(self, params: Run.Params, *, run_dir: RunDirectory, vocabulary: Vocabulary, engine: Engine) -> None:
        """Prepares; all ranks do so at the same time.

        Args:
            params: Of the run.
            run_dir: Seen by all ranks.
            vocabulary: Of the run; a checkpoint carries it.
            engine: Whose state is saved and restored.
        """
        self._engine = engine
        self._vocabulary = vocabulary
        self._last_step = -1
        self._ranks = Ranks(alone=engine.mesh is None)
        self._checkpointer: Checkpointer = params.checkpoint.instantiate(
            directory=run_dir.checkpoints, ranks=self._ranks, layout=_layout_of(engine), room=engine.updater.disk
        )
        self._files = {PARAMS_FILE: params.to_yaml().encode()} | {
            f"{parts.VOCABULARY}/{name}": data for name, data in vocabulary.save_files().items()
        }

    def due(self, *, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after `step` steps."""
        return self._checkpointer.should_save(step)

    def saved(self, *, step: int) -> bool:
        """Whether this process has saved, or restored, the checkpoint of `step`."""
        return self._last_step == step

    def save(self, position: Position, *, metrics: Mapping[str, float], wait: bool = False) -> None:
        """Saves a checkpoint, in the background unless `wait` or the params say otherwise."""
        state = dataclasses.asdict(position) | {
            "learner": self._engine.learner.state(),
            "vocabulary": self._vocabulary.fingerprint(),
        }
        self._checkpointer.save(
            step=position.step,
            tensors=self._engine.pieces(),
            state=state,
            files=self._files,
            metrics=metrics,
            wait=wait,
        )
        self._last_step = position.step

    def wait(self) -> None:
        """Returns when everything saved is on the disk; raises what went wrong."""
        self._checkpointer.wait()

    def restore(self, *, message: Callable[[str], object]) -> Position | None:
        """Loads the newest whole checkpoint into the engine; None where the run has none yet.

        It may have been written on any layout.

        Args:
            message: told of newer checkpoints that are damaged and were passed over.

        Raises:
            CheckpointError: all are damaged, or they are another model's.
            DataError: they were trained with another vocabulary.
        """
        if self._ranks.on_first(self._checkpointer.latest) is None:
            return None
        restored = self._checkpointer.restore(tensors=self._engine.pieces())
        for line in restored.messages:
            message(f"{line} Going on from step {restored.step}.")
        state = restored.state
        self._vocabulary.check_fingerprint(str(state.get("vocabulary")), where=str(restored.path))
        self._last_step = restored.step
        self._engine.loaded(learner_state=state["learner"])
        return Position(
            step=restored.step,
            data=state["data"],
            meter=state["meter"],
            early_stop=state["early_stop"],
            pending=state.get("pending"),
        )


def _layout_of(engine: Engine) -> str:
    """Returns the layout in words, for the manifest."""
    if engine.mesh is None:
        return "one process"
    stage = engine.parallel.zero.stage
    return f"{engine.mesh.layout}{f', zero {stage}' if stage else ''}"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A task with the weights of a checkpoint, ready to evaluate and decode; made from the checkpoint alone."""

    params: Run.Params
    vocabulary: Vocabulary
    task: BaseTask
    step: int
    path: Path
    precision: str

    device: torch.device

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[BaseTask]:
        """Gives the task in evaluation mode, with autograd off."""
        self.task.eval()
        precision = resolve_precision(self.precision, device=self.device)
        with torch.inference_mode(), autocast(precision, device=self.device):
            yield self.task

    def to_device(self, batch: NestedMap) -> NestedMap:
        """Returns `batch` with its tensors on the task's device."""
        return move(batch, device=self.device)


def checkpoint_params(opened: OpenCheckpoint) -> Run.Params:
    """Returns the run params that a checkpoint carries.

    Raises:
        CheckpointError: it carries none.
    """
    content = opened.files.get(PARAMS_FILE)
    if content is None:
        raise must(
            str(opened.path),
            f"carry {PARAMS_FILE}",
            AsText("without"),
            "Use a checkpoint that megaseq train or megaseq average has written",
            kind=CheckpointError,
        )
    return read_run_params(content.decode(), filename=str(opened.path / "files" / PARAMS_FILE))


def load_trained(
    path: Path | str, *, edit: Callable[[Run.Params], object] = lambda params: None, averaged: bool = True
) -> TrainedModel:
    """Builds the task of a checkpoint, or of the newest of a run directory, and loads its weights.

    Args:
        path: of a checkpoint or a run directory.
        edit: may change the params before anything is built, the data directory or the search, say.
        averaged: use the moving averages where the checkpoint has them.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it does not fit its params.
        ParamsError: the params ask for a GPU that is not there; `edit` may set `train.device`.
    """
    opened = OpenCheckpoint(path)
    params = checkpoint_params(opened)
    edit(params)
    parts.check_params(params)
    device = resolve_device(params.train.device)
    vocabulary = parts.vocabulary_of(params, files=opened.files)
    expected = opened.state.get("vocabulary")
    if expected is not None:
        vocabulary.check_fingerprint(str(expected), where=str(opened.path))
    task: BaseTask = parts.task_params(params, vocabulary=vocabulary).instantiate()
    _load_weights(task, opened=opened, averaged=averaged)
    # Autocast pays for its casts once a step in training, but once a token in decoding: bf16 weights do not.
    precision = resolve_precision(params.train.precision, device=device)
    if precision == "bf16":
        lower_precision(task)
    task.to(device)
    return TrainedModel(
        params=params,
        vocabulary=vocabulary,
        task=task,
        step=opened.manifest.step,
        path=opened.path,
        precision=precision,
        device=device,
    )


def _load_weights(task: BaseTask, *, opened: OpenCheckpoint, averaged: bool) -> None:
    """Fills parameters and buffers of `task` from the checkpoint, those without an average from the plain weights."""
    own = named_state(task)
    missing = sorted(name for name in own if name not in opened.entries)
    if missing:
        raise must(
            str(opened.path),
            "hold every parameter of its own params",
            AsText(f"without {missing[0]} ({len(missing)} missing)"),
            "Use the version of megaseq that wrote it",
            kind=CheckpointError,
        )
    stored = {
        name: f"{_AVERAGE_PREFIX}{name}" if averaged and f"{_AVERAGE_PREFIX}{name}" in opened.entries else name
        for name in own
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if tuple(opened.entries[stored[name]].size) != tuple(tensor.shape):
            raise must(
                f"{opened.path} {name}",
                f"have the shape {list(tensor.shape)}",
                AsText(str(list(opened.entries[stored[name]].size))),
                "Leave the params of the model as they were",
                kind=CheckpointError,
            )
        tensors[stored[name]] = tensor
    opened.read_into(tensors)
