"""The texts of a source in a cache, by index: for references, samples, and tokens that are drawn anew each epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaseq.data.build_once import build_once
from megaseq.data.columns import Column, ColumnWriter
from megaseq.data.order import Int64Array
from megaseq.data.source import Source
from megaseq.data.source_files import FileDigests

FORMAT = 1
"""Raised when the files' layout or the reading of texts changes."""
_FILES = "files.json"


class TextStore:
    """Pairs of texts, UTF-8 without line ends, memory-mapped; a text is found by its index in O(1)."""

    def __init__(self, directory: Path, *, key: str, files: Sequence[str]) -> None:
        self.key = key
        """Names the texts: equal keys, equal texts."""
        self.source = Column(directory, name="source", dtype=np.uint8)
        self.target = Column(directory, name="target", dtype=np.uint8)
        starts = json.loads((directory / _FILES).read_bytes())
        self._first_examples = np.array([start["example"] for start in starts], dtype=np.int64)
        self._first_lines = [int(start["line"]) for start in starts]
        self._files = tuple(files)

    @classmethod
    def open(cls, source: Source, *, cache_dir: Path) -> TextStore:
        """Opens the texts of `source`; reads the source first if `cache_dir` does not have them yet.

        Raises:
            DataError: A file is missing or has a bad line.
        """
        fingerprint = source.fingerprint(FileDigests(cache_dir / "digests"))
        key = hashlib.sha256(f"text/{FORMAT}/{fingerprint}".encode()).hexdigest()[:32]
        directory = cache_dir / "texts" / key
        build_once(
            directory,
            build=lambda temporary: write_texts(source, directory=temporary),
            what=f"text of {source.files()[0]}",
        )
        return cls(directory, key=key, files=source.files())

    def __len__(self) -> int:
        return len(self.source)

    def side(self, name: str) -> Column:
        """Returns the texts of side `name`, source or target."""
        return self.source if name == "source" else self.target

    def read(self, indices: Int64Array) -> tuple[list[str], list[str]]:
        """Returns the source texts and the target texts of examples `indices`."""
        sources, targets = self.source.read(indices), self.target.read(indices)
        return [text.decode() for text in sources], [text.decode() for text in targets]

    def location(self, index: int) -> str:
        """Returns `file:line` of an example."""
        place = int(np.searchsorted(self._first_examples, index, side="right")) - 1
        line = self._first_lines[place] + index - int(self._first_examples[place])
        return f"{self._files[place]}:{line}"


def write_texts(source: Source, *, directory: Path) -> None:
    """Streams `source` into the files of a text store."""
    starts: list[dict[str, int]] = []
    last_file, count = None, 0
    with ColumnWriter(directory, name="source") as sources, ColumnWriter(directory, name="target") as targets:
        for chunk in source.stream():
            if chunk.file != last_file:
                starts.append({"example": count, "line": chunk.line})
                last_file = chunk.file
            sources.append(b"".join(chunk.source), lengths=[len(text) for text in chunk.source])
            targets.append(b"".join(chunk.target), lengths=[len(text) for text in chunk.target])
            count += len(chunk.source)
    (directory / _FILES).write_text(json.dumps(starts))
