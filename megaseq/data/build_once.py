"""Directories that are built once: by one process while others wait, complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megaseq.data.problem import data_error

MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


def build_once(directory: Path, *, build: Callable[[Path], None], what: str) -> Path:
    """Makes sure that `directory` is there and complete, and returns it.

    `build` writes into a temporary directory beside it, which gets a manifest of sizes, is flushed to the disk and
    then renamed. The kernel drops the lock of a process that dies, so a build killed at any moment leaves at most a
    temporary directory, which the next builder removes.

    Args:
        directory: The final directory; its parents are made.
        build: Fills an empty directory; called by at most one process at a time.
        what: Names the thing in messages.

    Raises:
        DataError: There is no room or no permission to write.
    """
    if is_complete(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(f"{directory.name}.lock"), what=what):
            if not is_complete(directory):
                _build(directory, build=build)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        reason = error.strerror or str(error)
        rule = f"be writable, to keep the {what}"
        raise data_error(str(directory.parent), rule, f"not ({reason})", "Make room or set another cache_dir") from None
    return directory


def is_complete(directory: Path) -> bool:
    """Whether `directory` has its manifest and every file in it has the size that the manifest says."""
    try:
        sizes: dict[str, int] = json.loads((directory / MANIFEST).read_bytes())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def list_files(directory: Path) -> list[str]:
    """Returns the names of the files of a complete directory, sorted."""
    return sorted(json.loads((directory / MANIFEST).read_bytes()))


@contextlib.contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; says so in the log when it has to wait."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            _log.info("waiting for another process that builds the %s", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        # Closing the file releases the lock. The file stays: removing it would let a waiting process and a new one
        # hold locks on two different files of this name.
        yield


def _build(directory: Path, *, build: Callable[[Path], None]) -> None:
    for leftover in directory.parent.glob(f"{directory.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if directory.exists():  # Damaged: it is not complete.
        shutil.rmtree(directory)
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        build(temporary)
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        sizes = {path.name: path.stat().st_size for path in files}
        (temporary / MANIFEST).write_text(json.dumps(sizes))
        for path in (*files, temporary / MANIFEST, temporary):
            flush_to_disk(path)
        os.rename(temporary, directory)
        flush_to_disk(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
