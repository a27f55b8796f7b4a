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

from megaseq.base.errors import AsText, CheckpointError, must
from megaseq.checkpoint.directory import find_checkpoint
from megaseq.checkpoint.manifest import METADATA, DamagedError, Manifest, read_manifest, verify_files
from megaseq.checkpoint.piece import Piece, as_pieces, whole_piece
from megaseq.checkpoint.ranks import Ranks, rank_of
from megaseq.checkpoint.writing import FILES, STATE, first_failure

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    tensors: dict[str, Tensor]
    """By name: the caller's own when they were loaded in place; none when those were pieces."""
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
        needed = self._files_of(set(names))
        verify_files(self.path, manifest=self.manifest, hashed=sorted(needed - self._verified))
        self._verified |= needed

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns the tensors of these names, on the CPU."""
        tensors = {
            name: torch.empty(self.entries[name].size, dtype=self.entries[name].properties.dtype) for name in names
        }
        self.read_into(tensors)
        return tensors

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Verifies, then copies values into `tensors`; names and shapes must be those of `entries`."""
        self.read_pieces([whole_piece(name, tensor) for name, tensor in tensors.items()])

    @torch.no_grad()
    def read_pieces(self, pieces: Sequence[Piece], *, ranks: Ranks | None = None) -> None:
        """Verifies, then copies values into `pieces`, on whatever layout they were written.

        Args:
            pieces: Of this rank; names and global shapes must be those of `entries`.
            ranks: That call this together, and verify each file once on a machine; None is this process alone.

        Raises:
            DamagedError: When a file is not as it was written, on one rank or more; raised on all.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load as distributed_load

        from megaseq.checkpoint.planners import PieceLoadPlanner
        from megaseq.checkpoint.storage import SafetensorsReader

        ranks = ranks or Ranks(alone=True)
        self._verify_together({piece.name for piece in pieces}, ranks=ranks)
        try:
            distributed_load(
                {},
                storage_reader=SafetensorsReader(self.path, metadata=self._metadata),
                planner=PieceLoadPlanner(pieces),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
        except CheckpointException as failure:
            cause = first_failure(failure, ranks=ranks)
            if isinstance(cause, (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AssertionError)):
                raise DamagedError(
                    f"{self.path}: must be readable, but is not{rank_of(cause)}: {cause}. Use another one."
                ) from failure
            raise cause from failure
        except RuntimeError as error:
            raise ranks.lost(error) from error

    def _verify_together(self, names: set[str], *, ranks: Ranks) -> None:
        """Checks the files that hold these tensors: each on one of the ranks of a machine that need it."""
        if ranks.group is None:
            self.verify(names)
            return
        wanted = ranks.gather(sorted(self._files_of(names) - self._verified))
        nodes = ranks.nodes()
        neighbours = [rank for rank in range(ranks.size) if nodes[rank] == nodes[ranks.rank]]
        own: list[str] = []
        for number, file in enumerate(sorted({file for rank in neighbours for file in wanted[rank]})):
            readers = [rank for rank in neighbours if file in wanted[rank]]
            if readers[number % len(readers)] == ranks.rank:
                own.append(file)
        ranks.together(lambda: verify_files(self.path, manifest=self.manifest, hashed=own))
        self._verified |= self._files_of(names)

    def _files_of(self, names: set[str]) -> set[str]:
        return {chunk.file for index, chunk in self._metadata.storage_data.items() if index.fqn in names}

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
        """Returns (start, size, file) of the parts that a tensor is stored as."""
        files = {tuple(i.offset or ()): c.file for i, c in self._metadata.storage_data.items() if i.fqn == name}
        parts = self.entries[name].chunks
        return [(tuple(part.offsets), tuple(part.sizes), files[tuple(part.offsets)]) for part in parts]

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
    tensors: Mapping[str, Tensor] | Sequence[Piece] | None = None,
    prefixes: Sequence[str] | None = None,
    ranks: Ranks | None = None,
) -> Restored:
    """Loads a checkpoint.

    Args:
        path: Of the checkpoint, of its run directory (the newest is taken), or of the folder with the checkpoints.
        tensors: Loaded in place; must have exactly the names (with one of the `prefixes`), shapes and types of the
            checkpoint: whole tensors by name, or the pieces that this rank has of them. None returns new tensors on
            the CPU.
        prefixes: Which tensors: those whose names start with one of these; None is all.
        ranks: That call this together, each with its pieces; None is this process alone.

    Raises:
        DamagedError: When it is not whole; nothing was loaded then. Raised on all ranks.
        CheckpointError: When there is none, or it does not fit `tensors`. Raised on all ranks.
    """
    ranks = ranks or Ranks(alone=True)
    opened = ranks.together(lambda: OpenCheckpoint(path, prefixes=prefixes))
    _check_shared(opened, ranks=ranks)
    loaded: dict[str, Tensor]
    if tensors is None:
        loaded = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in opened.entries.items()}
        pieces = as_pieces(loaded)
    else:
        loaded = dict(tensors) if isinstance(tensors, Mapping) else {}
        pieces = as_pieces(tensors)
        _check_fit(pieces, opened=opened, ranks=ranks)
    opened.read_pieces(pieces, ranks=ranks)
    state, files = ranks.together(lambda: (opened.state, opened.files))
    return Restored(
        step=opened.manifest.step,
        tensors=loaded,
        state=state,
        files=files,
        metrics=dict(opened.manifest.metrics),
        path=opened.path,
    )


def _check_shared(opened: OpenCheckpoint, *, ranks: Ranks) -> None:
    """Raises CheckpointError where the ranks see different checkpoints under one name."""
    seen = ranks.gather(opened.manifest.to_json())
    if any(manifest != seen[0] for manifest in seen):
        raise must(
            str(opened.path),
            "be the same checkpoint on all ranks",
            AsText("another on some"),
            "Put the run directory on a file system that all machines share",
            kind=CheckpointError,
        )


def _check_fit(pieces: Sequence[Piece], *, opened: OpenCheckpoint, ranks: Ranks) -> None:
    """Raises CheckpointError when names, shapes or types differ: another model, not damage."""
    own = {piece.name: (piece.global_shape, piece.tensor.dtype) for piece in pieces}
    together: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for of_rank in ranks.gather(own):
        together.update(of_rank)
    missing, unknown = sorted(together.keys() - opened.entries.keys()), sorted(opened.entries.keys() - together.keys())
    problems = [f"{name} is not in it" for name in missing] + [f"{name} is only in it" for name in unknown]
    for name in sorted(together.keys() & opened.entries.keys()):
        (shape, dtype), stored = together[name], opened.entries[name]
        if shape != tuple(stored.size) or dtype != stored.properties.dtype:
            problems.append(f"{name} is {stored.properties.dtype} {list(stored.size)} instead of {dtype} {list(shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{opened.path}: must hold this model's tensors, but {'; '.join(problems[:3])}{more}. "
            "Use the params that the run was started with."
        )
