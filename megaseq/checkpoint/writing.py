"""Writing one checkpoint, whole or not at all."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint import directory as directories
from megaseq.checkpoint.manifest import MANIFEST, Manifest, is_safe_name
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
    tensors: Mapping[str, Tensor]
    state: bytes
    """JSON."""
    files: Mapping[str, bytes]
    metrics: Mapping[str, float]


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


def write_checkpoint(final: Path, *, content: Content, check_finite: bool) -> None:
    """Writes `content` to a temporary directory and gives it the name `final`, replacing what had it.

    Raises:
        CheckpointError: When it cannot be written, or `check_finite` finds nan or inf; the disk is as it was then.
    """
    temporary: Path | None = None
    try:
        temporary = directories.begin(final)
        _write(temporary, content=content, check_finite=check_finite)
        directories.commit(temporary, final=final)
    except OSError as error:
        raise CheckpointError(
            f"{final}: must be written whole, but is not: {error.strerror or error}. "
            "Older checkpoints are untouched; make room or mend the disk."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary: Path, *, content: Content, check_finite: bool) -> None:
    digests: dict[str, FileDigest] = {}
    for name, data in content.files.items():
        if not is_safe_name(name):
            raise CheckpointError(
                f"checkpoint file {name!r}: must be a relative path, but leaves the folder. Rename it."
            )
        path = temporary / FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[f"{FILES}/{name}"] = write_file(path, data=data)
    digests[STATE] = write_file(temporary / STATE, data=content.state)
    digests.update(_write_tensors(temporary, tensors=content.tensors, check_finite=check_finite))
    manifest = Manifest(step=content.step, metrics=content.metrics, files=digests)
    write_file(temporary / MANIFEST, data=manifest.to_json())


def _write_tensors(temporary: Path, *, tensors: Mapping[str, Tensor], check_finite: bool) -> dict[str, FileDigest]:
    # Imported where it is used: torch.distributed.checkpoint takes most of a second, which no start need wait for.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save as distributed_save

    from megaseq.checkpoint.storage import SafetensorsWriter

    writer = SafetensorsWriter(temporary, check_finite=check_finite)
    try:
        distributed_save(
            dict(tensors),
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    except CheckpointException as failure:
        raise first_failure(failure) from failure
    return writer.files


def first_failure(failure: CheckpointException) -> BaseException:
    """Returns the error behind torch's wrapper, which is not an Exception and would pass every handler."""
    for cause, _ in failure.failures.values():
        return cause
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
