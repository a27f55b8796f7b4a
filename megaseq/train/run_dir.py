"""The layout of a run directory, and the rules for going on in one that exists.

RUN/params.yaml, params.txt     what is run; the text form says where each value was set
RUN/vocabulary/                 the tokenizers' files
RUN/metrics.jsonl               all figures
RUN/checkpoints/step_00001000/  weights, optimizer state, position in the data; also params and tokenizers
RUN/decodes/step_00001000/      hypotheses, references and scores
RUN/status.json                 how far the trainer is, and whether it has finished
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaseq.base import params_from_yaml
from megaseq.base.errors import AsText, TrainingError, must
from megaseq.train.experiment import Run


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

    @property
    def params_yaml(self) -> Path:
        """The params, complete, as YAML."""
        return self.path / "params.yaml"

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

        Raises:
            TrainingError: the directory holds something else, another experiment's run, or this
                one's with other params and `allow_changed_params` is off.
        """
        changes: list[str] = []
        if self.params_yaml.is_file():
            changes = self._changes(params, allowed=allow_changed_params)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise must(
                f"--run-dir {self.path}",
                "be a run directory, empty or new",
                AsText("a directory with other files in it"),
                "Choose another directory",
                kind=TrainingError,
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "params.txt", params.to_text(origins=True))
        write_atomically(self.params_yaml, params.to_yaml())
        return changes

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
        changes = list(before.diff(params))
        if changes and not allowed:
            raise ChangedParamsError(self.path, changes)
        return changes

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


def vocabulary_files(directory: Path) -> dict[str, bytes]:
    """Returns the tokenizer files below `directory`, by path relative to its parent, as checkpoints carry them."""
    return {
        f"{directory.name}/{path.relative_to(directory).as_posix()}": path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
