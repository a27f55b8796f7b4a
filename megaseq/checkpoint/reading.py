"""Reading one checkpoint: verified first, then loaded, with nothing unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.directory import find_checkpoint
from megaseq.checkpoint.manifest import METADATA, DamagedError, Manifest, read_manifest, verify_files
from megaseq.checkpoint.writing import FILES, STATE, first_failure

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    tensors: dict[str, Tensor]
    """By name: the caller's own when they were loaded in place."""
    state: dict[str, Any]
    files: dict[str, bytes]
    metrics: dict[str, float]
    path: Path
    messages: tuple[str, ...] = field(default=())
    """One line for each newer checkpoint that could not be used, with file and reason."""


class OpenCheckpoint:
    """A checkpoint whose files are verified against its manifest: sizes and small files at once, tensors when read."""

    def __init__(self, path: str | os.PathLike[str], *, prefixes: Sequence[str] | None = None) -> None:
        """Opens and verifies.

        Args:
            path: Of the checkpoint, of its run directory, or of the folder with the run's checkpoints.
            prefixes: Only tensors whose names start with one of these are in `entries`; None is all.

        Raises:
            DamagedError: When a file is missing, cut short or altered.
            CheckpointError: When there is no checkpoint.
        """
        # Imported where it is used: torch.distributed.checkpoint takes most of a second, which no start need wait for.
        from megaseq.checkpoint.storage import read_metadata

        self.path = find_checkpoint(path)
        self.manifest: Manifest = read_manifest(self.path)
        for name in (METADATA, STATE):
            if name not in self.manifest.files:
                raise DamagedError(
                    f"{self.path}: must have {name}, but its manifest does not list it. Use another one."
                )
        small = [name for name in self.manifest.files if name in (METADATA, STATE) or name.startswith(f"{FILES}/")]
        verify_files(self.path, manifest=self.manifest, hashed=small)
        self._metadata: Metadata = read_metadata(self.path, known_files=self.manifest.files)
        chosen = self._metadata.state_dict_metadata
        if prefixes is not None:
            chosen = {name: entry for name, entry in chosen.items() if name.startswith(tuple(prefixes))}
        self.entries: dict[str, Any] = chosen
        """Shape (`size`) and type (`properties.dtype`) of each tensor by name."""
        self._verified: set[str] = set()

    def verify(self, names: Iterable[str]) -> None:
        """Checks the files that hold the tensors of these names against the manifest, each once.

        Raises:
            DamagedError: When one does not fit.
        """
        wanted = set(names)
        needed = {chunk.file for index, chunk in self._metadata.storage_data.items() if index.fqn in wanted}
        verify_files(self.path, manifest=self.manifest, hashed=sorted(needed - self._verified))
        self._verified |= needed

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns the tensors of these names, on the CPU."""
        tensors = {
            name: torch.empty(self.entries[name].size, dtype=self.entries[name].properties.dtype) for name in names
        }
        self.read_into(tensors)
        return tensors

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Verifies, then copies values into `tensors`; names, shapes and types must be those of `entries`."""
        if not tensors:
            return
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import load as distributed_load

        from megaseq.checkpoint.storage import SafetensorsReader

        self.verify(tensors)
        try:
            distributed_load(
                dict(tensors),
                storage_reader=SafetensorsReader(self.path, metadata=self._metadata),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=True,
            )
        except CheckpointException as failure:
            cause = first_failure(failure)
            if isinstance(cause, (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AssertionError)):
                raise DamagedError(f"{self.path}: must be readable, but is not: {cause}. Use another one.") from failure
            raise cause from failure

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state."""
        try:
            state = json.loads((self.path / STATE).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"{self.path / STATE}: must be JSON, but is not ({error}). Use another one.") from None
        if not isinstance(state, dict):
            raise DamagedError(f"{self.path / STATE}: must be a JSON object, but is not. Use another one.")
        return state

    @property
    def files(self) -> dict[str, bytes]:
        """The extra files by name."""
        prefix = f"{FILES}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): (self.path / name).read_bytes() for name in names}


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    prefixes: Sequence[str] | None = None,
) -> Restored:
    """Loads a checkpoint.

    Args:
        path: Of the checkpoint, of its run directory (the newest is taken), or of the folder with the checkpoints.
        tensors: Loaded in place; must have exactly the names (with one of the `prefixes`), shapes and types of the
            checkpoint. None returns new tensors on the CPU.
        prefixes: Which tensors: those whose names start with one of these; None is all.

    Raises:
        DamagedError: When it is not whole; nothing was loaded then.
        CheckpointError: When there is none, or it does not fit `tensors`.
    """
    opened = OpenCheckpoint(path, prefixes=prefixes)
    if tensors is None:
        loaded = opened.read(list(opened.entries))
    else:
        _check_fit(tensors, opened=opened)
        opened.read_into(tensors)
        loaded = dict(tensors)
    return Restored(
        step=opened.manifest.step,
        tensors=loaded,
        state=opened.state,
        files=opened.files,
        metrics=dict(opened.manifest.metrics),
        path=opened.path,
    )


def _check_fit(tensors: Mapping[str, Tensor], *, opened: OpenCheckpoint) -> None:
    """Raises CheckpointError when names, shapes or types differ: another model, not damage."""
    missing, unknown = sorted(tensors.keys() - opened.entries.keys()), sorted(opened.entries.keys() - tensors.keys())
    problems = [f"{name} is not in it" for name in missing] + [f"{name} is only in it" for name in unknown]
    for name in sorted(tensors.keys() & opened.entries.keys()):
        own, stored = tensors[name], opened.entries[name]
        if own.shape != stored.size or own.dtype != stored.properties.dtype:
            problems.append(
                f"{name} is {stored.properties.dtype} {list(stored.size)} instead of {own.dtype} {list(own.shape)}"
            )
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{opened.path}: must hold this model's tensors, but {'; '.join(problems[:3])}{more}. "
            "Use the params that the run was started with."
        )
