"""Patterns, numbered lines and content hashes."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from megaseq.base.errors import DataError
from megaseq.data.source_files import FileDigests, LineReader, match_files


def read_all(path: Path) -> list[bytes]:
    lines: list[bytes] = []
    with LineReader(str(path)) as reader:
        while more := reader.read(2):
            lines += more
    return lines


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\u2028still one\x0b\r\n\n three \nlast".encode())
    assert read_all(path) == ["one\u2028still one\x0b".encode(), b"", b" three ", b"last"]


def test_gzip_is_read_through(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("für\nzwei\n".encode()))
    assert read_all(path) == ["für".encode(), b"zwei"]


def test_truncated_gzip_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    text = "".join(f"line {hashlib.sha256(str(i).encode()).hexdigest()}\n" for i in range(2000))
    data = gzip.compress(text.encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.gz:\d+: must be readable to its end"):
        read_all(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"a\.txt\.gz:1: must be readable to its end"):
        read_all(path)


def test_invalid_utf8_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nfine\n\xe4bc\n")
    with pytest.raises(DataError, match=r"a\.txt:3: must be UTF-8, but is byte 0xe4 at column 1\. Convert"):
        read_all(path)
    path.write_bytes(b"cut \xc3\n\xa4\n")  # Valid only if the two lines were joined without their end.
    with pytest.raises(DataError, match=r"a\.txt:1: must be UTF-8"):
        read_all(path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.touch()
    with pytest.raises(DataError, match=r"a\.txt:1: must have at least one line, but is an empty file\."):
        read_all(path)


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt", "d.gz"):
        (tmp_path / name).touch()
    (tmp_path / "dir.txt").mkdir()
    names = [os.path.basename(path) for path in match_files("*.txt", data_dir=str(tmp_path))]
    assert names == ["a.txt", "b.txt", "c[1].txt"]
    assert match_files("c[1].txt", data_dir=str(tmp_path)) == [str(tmp_path / "c[1].txt")]
    assert match_files(str(tmp_path / "d.gz"), data_dir="/elsewhere") == [str(tmp_path / "d.gz")]
    with pytest.raises(DataError, match=r"none\.txt: must match at least one file, but is missing"):
        match_files("none.txt", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"\*\.none: must match at least one file, but is a pattern without a match"):
        match_files("*.none", data_dir=str(tmp_path))


def test_digest_is_remembered_and_follows_changes(tmp_path: Path) -> None:
    path, memory = tmp_path / "a.txt", tmp_path / "memory"
    path.write_text("one")
    os.utime(path, ns=(10**18, 10**18))
    digests = FileDigests(memory)
    assert digests.of(str(path)) == hashlib.sha256(b"one").hexdigest()
    assert len(list(memory.iterdir())) == 1
    # Same size and time: only the memory can know the old hash.
    with open(path, "r+") as file:
        file.write("two")
    os.utime(path, ns=(10**18, 10**18))
    assert digests.of(str(path)) == hashlib.sha256(b"one").hexdigest()
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert digests.of(str(path)) == hashlib.sha256(b"two").hexdigest()


def test_digest_of_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    FileDigests(tmp_path / "memory").of(str(path))
    assert not (tmp_path / "memory").exists()
