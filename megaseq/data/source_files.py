"""Files of text: patterns, lines with their numbers, and content hashes that are computed once."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import time
import zlib
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megaseq.data.problem import data_error

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A file changed again within the resolution of the clock keeps its time, so the hash of a younger file is not kept.
_SETTLED_NANOSECONDS = 2_000_000_000


class Line(NamedTuple):
    """One line and where it stands; `str()` gives `file:line`."""

    path: str
    number: int
    text: bytes

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def match_files(pattern: str, *, data_dir: str) -> list[str]:
    """Returns the files that match `pattern` under `data_dir`, sorted; raises DataError if there is none."""
    path = os.path.join(os.path.expanduser(data_dir), os.path.expanduser(pattern))
    # A file whose own name has brackets must be found by that name.
    found = [path] if os.path.isfile(path) else sorted(name for name in glob.glob(path) if os.path.isfile(name))
    if not found:
        raise data_error(
            path,
            "match at least one file",
            "a pattern without a match" if glob.has_magic(path) else "missing",
            "Check the pattern and data_dir (--data-dir)",
        )
    return found


class LineReader:
    """Reads a text file, gzipped if it ends in `.gz`, as checked UTF-8 lines without their ends.

    Only `\\n` and `\\r\\n` end a line: other Unicode separators occur inside real sentences, and splitting at them
    would move two parallel files against each other.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.next_line = 1
        try:
            self._file = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise data_error(path, "be readable", f"not ({error.strerror or error})", "Check the file") from None

    def __enter__(self) -> LineReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, count: int) -> list[bytes]:
        """Returns the next `count` lines, fewer at the end; raises DataError for an empty file and for bad bytes."""
        lines = self._read_raw(count)
        if not lines and self.next_line == 1:
            rule = "have at least one line"
            raise data_error(f"{self.path}:1", rule, "an empty file", "Check how the file was made")
        self._check_utf8(lines)
        if self.next_line == 1 and lines[0].startswith(_BYTE_ORDER_MARK):
            lines[0] = lines[0][len(_BYTE_ORDER_MARK) :]
        self.next_line += len(lines)
        return [line[:-2] if line.endswith(b"\r\n") else line.rstrip(b"\n") for line in lines]

    def count_rest(self) -> int:
        """Reads to the end; returns how many lines the whole file has."""
        while lines := self._read_raw(1 << 16):
            self.next_line += len(lines)
        return self.next_line - 1

    def _read_raw(self, count: int) -> list[bytes]:
        try:
            return list(islice(self._file, count))
        except (OSError, EOFError, zlib.error) as error:
            raise data_error(
                f"{self.path}:{self.next_line}",
                "be readable to its end",
                f"broken somewhere after this line: {error}",
                "Fetch the file again",
            ) from None

    def _check_utf8(self, lines: list[bytes]) -> None:
        try:
            b"".join(lines).decode()
            return
        except UnicodeDecodeError:
            pass
        for number, line in enumerate(lines, self.next_line):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise data_error(
                    f"{self.path}:{number}",
                    "be UTF-8",
                    f"byte 0x{line[error.start]:02x} at column {error.start + 1}",
                    "Convert the file to UTF-8",
                ) from None


class FileDigests:
    """SHA-256 of files' contents, remembered in `directory` by (path, size, time of change)."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def of(self, path: str) -> str:
        """Returns the hash of the contents of `path`; reads the file only if it changed since the last time."""
        absolute = os.path.abspath(path)
        stat = os.stat(absolute)
        now = [absolute, stat.st_size, stat.st_mtime_ns, stat.st_ino]
        memory = None
        if self._directory is not None:
            memory = self._directory / f"{hashlib.sha256(absolute.encode()).hexdigest()[:32]}.json"
            known = _read_json(memory)
            if isinstance(known, dict) and known.get("file") == now:
                return str(known.get("sha256"))
        with open(absolute, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if memory is not None and time.time_ns() - stat.st_mtime_ns > _SETTLED_NANOSECONDS:
            _write_json(memory, value={"file": now, "sha256": digest})
        return digest


def _read_json(path: Path) -> object:
    try:
        value: object = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value


def _write_json(path: Path, *, value: object) -> None:
    """Writes by rename, so that a reader never sees half a file; a read-only directory only costs the memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(value))
        os.replace(temporary, path)
    except OSError:
        pass
