"""Writing one checkpoint, whole or not at all."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaseq.base.errors import AsText, CheckpointError, must
from megaseq.checkpoint import directory as directories
from megaseq.checkpoint.manifest import MANIFEST, Manifest, is_safe_name
from megaseq.checkpoint.piece import Part
from megaseq.checkpoint.ranks import Ranks, rank_of, with_rank
from megaseq.checkpoint.safetensors_file import FileDigest, write_file

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

STATE = "state.json"
FILES = "files"

# One process without a process group is what we mean, and nothing to warn of at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Content:
    """Everything that goes into a checkpoint."""

    step: int
    parts: Sequence[Part]
    """What this rank writes of the tensors."""
    state: bytes
    """JSON."""
    files: Mapping[str, bytes]
    metrics: Mapping[str, float]
    layout: str = ""
    """How the run was laid out over its ranks, for people."""


def encode_state(state: Mapping[str, Any]) -> bytes:
    """Returns the JSON of the state.

    Raises:
        CheckpointError: When a value in it is not a JSON value.
    """
    try:
        return json.dumps(state, allow_nan=True).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint state: must be JSON values, but is not ({error}). Convert it first."
        ) from None


def write_checkpoint(final: Path, *, content: Content, check_finite: bool, ranks: Ranks | None = None) -> None:
    """Writes `content` to a temporary directory and gives it the name `final`, replacing what had it.

    Every rank writes and flushes its parts; then rank 0 writes the manifest of all files and renames the directory.

    Args:
        final: Path of the checkpoint, on a file system that all ranks see.
        content: Of this rank; all but the parts count on rank 0 only.
        check_finite: Whether nan or inf is an error.
        ranks: That call this together; None is this process alone.

    Raises:
        CheckpointError: When it cannot be written by all ranks, or `check_finite` finds nan or inf; raised on all
            ranks, and the disk is as it was then.
    """
    ranks = ranks or Ranks(alone=True)
    temporary: Path | None = None
    try:
        temporary = ranks.on_first(lambda: directories.begin(final))
        _write(temporary, final=final, content=content, check_finite=check_finite, ranks=ranks)
    except OSError as error:
        raise CheckpointError(
            f"{final}: must be written whole, but is not: {error.strerror or error}{rank_of(error)}. "
            "Older checkpoints are untouched; make room or mend the disk."
        ) from error
    finally:
        if temporary is not None and ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary: Path, *, final: Path, content: Content, check_finite: bool, ranks: Ranks) -> None:
    digests: dict[str, FileDigest] = ranks.together(lambda: _write_small(temporary, content=content, ranks=ranks))
    digests.update(_write_tensors(temporary, parts=content.parts, check_finite=check_finite, ranks=ranks))

    def finish() -> None:
        manifest = Manifest(
            step=content.step, metrics=content.metrics, files=digests, layout=content.layout, ranks=ranks.size
        )
        write_file(temporary / MANIFEST, data=manifest.to_json())
        directories.commit(temporary, final=final)

    ranks.on_first(finish)


def _write_small(temporary: Path, *, content: Content, ranks: Ranks) -> dict[str, FileDigest]:
    """Writes state and extra files on rank 0; the others see whether they are where it is."""
    digests: dict[str, FileDigest] = {}
    if not ranks.is_first:
        if not temporary.is_dir():
            raise must(
                str(temporary.parent),
                "be the same directory for all ranks",
                AsText("another one here"),
                "Put the run directory on a file system that all machines share",
                kind=CheckpointError,
            )
        return digests
    for name, data in content.files.items():
        if not is_safe_name(name):
            raise CheckpointError(
                f"checkpoint file {name!r}: must be a relative path, but leaves the folder. Rename it."
            )
        path = temporary / FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[f"{FILES}/{name}"] = write_file(path, data=data)
    digests[STATE] = write_file(temporary / STATE, data=content.state)
    return digests


def _write_tensors(
    temporary: Path, *, parts: Sequence[Part], check_finite: bool, ranks: Ranks
) -> dict[str, FileDigest]:
    # Imported where it is used: torch.distributed.checkpoint takes most of a second, which no start need wait for.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as distributed_save

    from megaseq.checkpoint.planners import PieceSavePlanner
    from megaseq.checkpoint.storage import SafetensorsWriter

    writer = SafetensorsWriter(temporary, check_finite=check_finite)
    try:
        distributed_save(
            {},
            storage_writer=writer,
            planner=PieceSavePlanner(parts),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as failure:
        raise first_failure(failure, ranks=ranks) from failure
    except RuntimeError as error:
        raise ranks.lost(error) from error
    return writer.files


def first_failure(failure: CheckpointException, *, ranks: Ranks) -> BaseException:
    """Returns the error behind torch's wrapper, which is not an Exception and would pass every handler."""
    for rank, (cause, _) in sorted(failure.failures.items()):
        return cause if ranks.group is None else with_rank(cause, rank=rank)
    return CheckpointError(f"checkpoint: must be saved or loaded, but is not: {failure}. Try again.")


class WriterThread:
    """Runs one function in the background at a time; its error is raised by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, target: Any) -> None:
        """Starts `target`, which takes no arguments; call `wait` first."""

        def run() -> None:
            try:
                target()
            except BaseException as error:
                self._error = error

        # Not a daemon: an interpreter that ends in order finishes the checkpoint first.
        self._thread = threading.Thread(target=run, name="checkpoint-writer", daemon=False)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a function is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the function, if any, and raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


__all__ = ["FILES", "STATE", "Content", "WriterThread", "encode_state", "first_failure", "write_checkpoint"]
