"""The manifest: what files a checkpoint consists of, with size and checksum of each.

It is written last, so a directory without one is not a checkpoint. It carries a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.safetensors_file import FileDigest

MANIFEST = "manifest.json"
METADATA = "tensors.json"
"""File that says which tensors there are and where; see storage.py."""
FORMAT = "megaseq-checkpoint"
VERSION = 1

_PIECE_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedError(CheckpointError):
    """A checkpoint of which a file is missing, cut short or altered; an older one may do instead."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    metrics: Mapping[str, float]
    files: Mapping[str, FileDigest]
    layout: str = ""
    """How the run that wrote it was laid out over its ranks; empty where it is not known."""
    ranks: int = 1
    """How many ranks wrote it."""

    def to_json(self) -> bytes:
        """Returns the bytes of the file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "metrics": dict(self.metrics),
            "written_by": {"layout": self.layout, "ranks": self.ranks},
            "files": {name: {"size": d.size, "sha256": d.sha256} for name, d in sorted(self.files.items())},
        }
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1).encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises:
        DamagedError: When it is missing or not what this version writes; the text names file and reason.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedError(_damage(path, f"cannot be read ({error.strerror or error})")) from None
    except (ValueError, RecursionError):
        raise DamagedError(_damage(path, "is not JSON")) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(_damage(path, "is not a megaseq manifest"))
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: must have version {VERSION}, but is {content.get('version')!r}. Read it with the megaseq "
            f"that wrote it."
        )
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise DamagedError(_damage(path, "does not have its own checksum"))
    try:
        writer = content.get("written_by", {})
        return Manifest(
            step=int(content["step"]),
            metrics={str(name): float(value) for name, value in content["metrics"].items()},
            files={
                _safe_name(name): FileDigest(size=int(entry["size"]), sha256=_sha256(entry["sha256"]))
                for name, entry in content["files"].items()
            },
            layout=str(writer.get("layout", "")),
            ranks=int(writer.get("ranks", 1)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(_damage(path, f"has a bad entry ({error})")) from None


def verify_files(directory: Path, *, manifest: Manifest, hashed: Iterable[str] | None = None) -> None:
    """Checks the files of a checkpoint against its manifest: the size of all, the checksum of those in `hashed`.

    Raises:
        DamagedError: When one does not fit; the text names file and reason.
    """
    for name, digest in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
        except OSError:
            raise DamagedError(_damage(path, "is missing")) from None
        if size != digest.size:
            raise DamagedError(_damage(path, f"has {size:,} bytes instead of {digest.size:,}"))
    for name in manifest.files if hashed is None else hashed:
        path = directory / name
        try:
            actual = file_sha256(path)
        except OSError as error:
            raise DamagedError(_damage(path, f"cannot be read ({error.strerror or error})")) from None
        if actual != manifest.files[name].sha256:
            raise DamagedError(_damage(path, "does not have the SHA-256 of the manifest"))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            sha.update(piece)
    return sha.hexdigest()


def is_safe_name(name: str) -> bool:
    """Says whether `name` is a relative path that stays inside the checkpoint."""
    pure = PurePosixPath(name)
    return (
        bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and "\0" not in name
    )


def _safe_name(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"file name {name!r} leaves the directory")
    return name


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("sha256 must be 64 hexadecimal digits")
    return value


def _damage(path: Path, reason: str) -> str:
    return f"{path}: must be whole, but {reason}. Use another checkpoint."
