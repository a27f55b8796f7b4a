"""Ragged arrays in files: many short sequences behind each other, memory-mapped, gathered by index."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megaseq.data.order import Int64Array

Array = npt.NDArray[Any]


def map_file(path: Path, *, dtype: npt.DTypeLike) -> Array:
    """Maps a file of numbers for reading; an empty file is an empty array."""
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


def release(array: Array) -> None:
    """Gives the pages of a mapped array back; they stay in the system's cache and are read again when needed.

    Without it the resident memory of a process that reads all over a file grows to the file's size.
    """
    base: Any = array.base
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class ColumnWriter:
    """Writes `NAME.values` and `NAME.offsets` (little-endian int64, one more than sequences)."""

    def __init__(self, directory: Path, *, name: str) -> None:
        self._values = open(directory / f"{name}.values", "wb")  # noqa: SIM115
        self._offsets = open(directory / f"{name}.offsets", "wb")  # noqa: SIM115
        self._offsets.write(np.zeros(1, dtype="<i8").tobytes())
        self._end = 0

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._values.close()
        self._offsets.close()

    def append(self, values: bytes | Array, *, lengths: Sequence[int] | Array) -> None:
        """Appends sequences of `lengths` items, which stand behind each other in `values`."""
        ends = np.cumsum(np.asarray(lengths, dtype="<i8")) + self._end
        self._values.write(values if isinstance(values, bytes) else values.tobytes())
        self._offsets.write(ends.astype("<i8").tobytes())
        if len(ends):
            self._end = int(ends[-1])


class Column:
    """Sequences in files that a `ColumnWriter` wrote, read through memory maps."""

    def __init__(self, directory: Path, *, name: str, dtype: npt.DTypeLike) -> None:
        self._origin = (directory, name, dtype)
        self.values = map_file(directory / f"{name}.values", dtype=dtype)
        self.offsets = map_file(directory / f"{name}.offsets", dtype="<i8")

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process maps the files itself."""
        return _open_column, (self._origin,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def gather(self, indices: Int64Array) -> tuple[Array, Int64Array]:
        """Returns the values of the sequences `indices` behind each other, and their lengths [indices].

        Reads at ascending places of the file, whatever the order of `indices`, since a disk is quicker that way.
        """
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        lengths = stops - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        result = np.empty(total, dtype=self.values.dtype)
        order = np.argsort(starts, kind="stable")
        # In pieces, so that the arrays of places stay small beside the result.
        for piece in np.array_split(order, max(1, total >> 20)):
            places = ranges(starts[piece], lengths=lengths[piece])
            result[ranges((ends - lengths)[piece], lengths=lengths[piece])] = self.values[places]
        release(self.values)
        release(self.offsets)
        return result, lengths

    def read(self, indices: Int64Array) -> list[bytes]:
        """Returns the sequences as bytes, for columns of text."""
        starts, stops = self.offsets[indices].tolist(), self.offsets[indices + 1].tolist()
        texts = [self.values[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)]
        release(self.values)
        release(self.offsets)
        return texts


def _open_column(origin: tuple[Path, str, npt.DTypeLike]) -> Column:
    return Column(origin[0], name=origin[1], dtype=origin[2])


def ranges(starts: Int64Array, *, lengths: Int64Array) -> Int64Array:
    """Returns starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    result: Int64Array = np.repeat(starts - (ends - lengths), lengths)
    result += np.arange(total, dtype=np.int64)
    return result
