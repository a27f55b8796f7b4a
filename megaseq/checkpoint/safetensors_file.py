"""Writing safetensors files as a stream, with their checksum taken on the way.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the raw tensors.
Reading is left to the safetensors package; writing is ours so that a tensor is copied from the device only when it is
its turn, and so that a checkpoint need not be read again to be hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256, in hexadecimal, of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor to be written: what the header says of it, and where its values come from when it is its turn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    resolve: Callable[[], Tensor]


class HashingFile:
    """A new file that is hashed while it is written and flushed to the disk when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data` in pieces, so that hashing and writing share the cache."""
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._hash.update(piece)
            self._file.write(piece)
        self._size += len(view)

    @property
    def digest(self) -> FileDigest:
        """Size and checksum of what was written so far."""
        return FileDigest(size=self._size, sha256=self._hash.hexdigest())


def write_file(path: Path, *, data: bytes) -> FileDigest:
    """Writes a new file of these bytes, flushed to the disk; returns its digest."""
    with HashingFile(path) as file:
        file.write(data)
    return file.digest


def write_entries(
    path: Path, *, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Writes a new safetensors file, flushed to the disk.

    Args:
        path: Must not exist.
        entries: In any order; wide types are put first so that every tensor is aligned.
        metadata: The header's free text.

    Returns:
        The file's digest.

    Raises:
        TypeError: When a type has no name in the format.
        OSError: When the disk does not take it.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        if entry.dtype not in DTYPE_NAMES:
            raise TypeError(f"{entry.name}: must have a type that safetensors knows, but is {entry.dtype}. Convert it.")
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            file.write(tensor_bytes(entry.resolve()))
    return file.digest


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the raw values of `tensor` in row-major order, without a copy where it lies so on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def export_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Writes `tensors` to one safetensors file, whole or not at all.

    Args:
        tensors: By name; on any device.
        path: Replaced when it exists.
        metadata: Free text for the header.

    Returns:
        The file's digest.
    """
    return export_entries([_entry(name, tensor) for name, tensor in tensors.items()], path, metadata=metadata)


def export_entries(
    entries: Sequence[TensorEntry], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Writes tensors, each asked for when it is its turn, as `export_safetensors` does."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        digest = write_entries(temporary, entries=entries, metadata=metadata or {"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), resolve=lambda: tensor)
