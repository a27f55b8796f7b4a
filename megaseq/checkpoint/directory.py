"""The directory of checkpoints: names, listing, commit by rename, and what a killed process left behind."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.manifest import MANIFEST

_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_DELETED = ".deleted-"


def step_name(step: int) -> str:
    """Returns the name of the directory of a step, for example step_00001000."""
    return f"step_{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Returns the steps with a committed checkpoint, in order; whether one is whole shows when it is read."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
    return sorted(step for step in found if (directory / step_name(step)).is_dir())


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint that `path` means: itself, or the newest in it, or in its `checkpoints` folder.

    Raises:
        CheckpointError: When there is none.
    """
    path = Path(path)
    # One that lost its manifest is still what was meant; reading it says what is wrong.
    if (path / MANIFEST).is_file() or (_NAME.fullmatch(path.name) and path.is_dir()):
        return path
    for directory in (path / "checkpoints", path):
        steps = list_steps(directory)
        if steps:
            return directory / step_name(steps[-1])
    raise CheckpointError(
        f"{path}: must be a checkpoint, or a run directory with one, but has no {MANIFEST} and no step_ folder. "
        f"Check the path."
    )


def begin(final: Path) -> Path:
    """Makes and returns the temporary directory, beside `final`, that a checkpoint is written to."""
    temporary = final.parent / f"{_TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, *, final: Path) -> None:
    """Gives a written checkpoint its name, in one rename, and flushes that to the disk.

    An older one of that name is moved aside first and deleted last; `clean` undoes it after a kill in between.
    """
    directory = final.parent
    for folder, _, _ in os.walk(temporary):
        flush_directory(Path(folder))
    replaced: Path | None = None
    if final.exists():
        replaced = directory / f"{_REPLACED}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    flush_directory(directory)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def delete(directory: Path, *, step: int) -> None:
    """Deletes a checkpoint; it loses its name first, so that a half-deleted one is never taken for whole."""
    path = directory / step_name(step)
    doomed = directory / f"{_DELETED}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        os.replace(path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def clean(directory: Path) -> list[str]:
    """Removes what a killed process left; only the one process that writes here may call it. Returns the names."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    cleaned = []
    for name in names:
        path = directory / name
        if name.startswith(_REPLACED) and not (directory / name.removeprefix(_REPLACED)).exists():
            os.replace(path, directory / name.removeprefix(_REPLACED))
        elif name.startswith((_TEMPORARY, _DELETED, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)
            cleaned.append(name)
    return cleaned


def flush_directory(path: Path) -> None:
    """Flushes the names in a directory to the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # Some network file systems refuse this for directories; the rename holds without it.
        pass
    finally:
        os.close(descriptor)
