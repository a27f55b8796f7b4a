"""The layout of a run directory, and the rules for going on in one that exists.

RUN/params.yaml, params.txt     what is run; the text form says where each value was set
RUN/parameters.txt              the model's parameters with their shapes, and which patterns of the learner match them
RUN/vocabulary/                 the tokenizers' files
RUN/metrics.jsonl               all figures
RUN/checkpoints/step_00001000/  weights, optimizer state, position in the data; also params and tokenizers
RUN/decodes/step_00001000/      hypotheses, references and scores
RUN/status.json                 how far the trainer is, and whether it has finished
RUN/trainer.lock                held by the process that trains
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from megaseq.base import params_from_yaml
from megaseq.base.errors import AsText, TrainingError, must
from megaseq.checkpoint import list_steps
from megaseq.train.experiment import Run

LOCK = "trainer.lock"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes `path` so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def params_yaml(self) -> Path:
        """The params, complete, as YAML."""
        return self.path / "params.yaml"

    @property
    def parameters_txt(self) -> Path:
        """The model's parameters, and what the learner does with each."""
        return self.path / "parameters.txt"

    @property
    def vocabulary(self) -> Path:
        """Directory of the tokenizers' files."""
        return self.path / "vocabulary"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def cache(self) -> Path:
        """Directory of token caches, unless the params name another."""
        return self.path / "cache"

    def decodes(self, *, step: int) -> Path:
        """Directory of what the checkpoint of `step` decodes to."""
        return self.path / "decodes" / f"step_{step:08d}"

    def read_params(self) -> Run.Params:
        """Returns the params that the directory was made with.

        Raises:
            TrainingError: this is no run directory.
        """
        if not self.params_yaml.is_file():
            raise must(
                str(self.path),
                "be a run directory, with params.yaml in it",
                AsText("a path without it" if self.path.exists() else "missing"),
                "Give the --run-dir of a training run",
                kind=TrainingError,
            )
        return read_run_params(self.params_yaml.read_text(encoding="utf-8"), filename=str(self.params_yaml))

    def prepare(self, params: Run.Params, *, allow_changed_params: bool = False) -> list[str]:
        """Makes the directory ready for `params`; returns the lines in which they differ from the run's own so far.

        The layout, that is `parallel`, may always differ.

        Raises:
            TrainingError: the directory holds something else, another experiment's run, this one's with other params
                and `allow_changed_params` is off, or a process trains in it; or it cannot be written.
        """
        known = self.params_yaml.is_file()
        if not known and self.path.is_dir() and any(p.name != LOCK for p in self.path.iterdir()):
            raise must(
                f"--run-dir {self.path}",
                "be a run directory, empty or new",
                AsText("a directory with other files in it"),
                "Choose another directory",
                kind=TrainingError,
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            begun = bool(list_steps(self.checkpoints))
            changes = self._changes(params, allowed=allow_changed_params or not begun) if known else []
            if changes and not begun:
                # Nothing was trained yet, because a file was missing, say: this is the beginning.
                shutil.rmtree(self.vocabulary, ignore_errors=True)
                changes = []
            write_atomically(self.path / "params.txt", params.to_text(origins=True))
            write_atomically(self.params_yaml, params.to_yaml())
        except OSError as error:
            self.unlock()
            reason = error.strerror or str(error)
            raise must(
                f"--run-dir {self.path}",
                "be a directory that can be written",
                AsText(f"not ({reason})"),
                "Choose another",
                kind=TrainingError,
            ) from None
        except BaseException:
            self.unlock()
            raise
        return changes

    def lock(self) -> None:
        """Makes this process the only one that trains here, until `unlock` or its end, however it ends.

        Raises:
            TrainingError: another process trains here.
        """
        file = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            # Not flock(): worker processes would inherit that, and hold it on for a while after a kill of the trainer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # A file system without locks: nothing is known then, and nothing is refused.
            raise must(
                f"--run-dir {self.path}",
                "be trained in by one process at a time",
                AsText(f"in use by {holder}"),
                "Stop that one first, or choose another directory",
                kind=TrainingError,
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        """Lets other processes train here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _changes(self, params: Run.Params, *, allowed: bool) -> list[str]:
        before = self.read_params()
        if before.name != params.name:
            raise must(
                f"--run-dir {self.path}",
                f"hold a run of {params.name}",
                AsText(f"a run of {before.name}"),
                "Choose another directory",
                kind=TrainingError,
            )
        # Where and how a run is computed is no part of what it computes: any layout goes on from any other.
        moved = before.copy()
        moved.parallel = params.parallel.copy()
        changes = list(moved.diff(params))
        if changes and not allowed:
            raise ChangedParamsError(self.path, changes)
        return list(before.diff(params))

    def write_status(self, *, step: int, status: str) -> None:
        """Records how far training is: `running`, `stopped`, `finished` or `failed`, after `step` steps."""
        write_atomically(self.path / "status.json", json.dumps({"status": status, "step": step}) + "\n")

    def read_status(self) -> Mapping[str, Any]:
        """Returns what `write_status` recorded last; `running` at step 0 if nothing yet."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"status": "running", "step": 0}
        return status if isinstance(status, dict) else {"status": "running", "step": 0}


class ChangedParamsError(TrainingError):
    """The params of a run directory are not those asked for; `changes` are the lines of their difference."""

    def __init__(self, path: Path, changes: list[str]) -> None:
        self.changes = changes
        plural = "value" if len(changes) == 1 else "values"
        super().__init__(
            f"--run-dir {path}: must be gone on with under the params it was begun with, but is asked for with "
            f"{len(changes)} other {plural} (above). Pass --allow-changed-params, or choose another directory."
        )


def read_run_params(text: str, *, filename: str) -> Run.Params:
    """Returns the run params in YAML `text`; `filename` is for messages.

    Raises:
        TrainingError: it holds the params of something else.
    """
    params = params_from_yaml(text, filename=filename)
    if not isinstance(params, Run.Params):
        raise must(
            filename, "hold the params of a run", type(params).__qualname__, "Check the path", kind=TrainingError
        )
    return params
