"""What is in a checkpoint, or in a folder of them, as text."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.directory import list_steps, step_name
from megaseq.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_files
from megaseq.checkpoint.reading import OpenCheckpoint


def inspect(path: str | os.PathLike[str], *, pattern: str | None = None) -> str:
    """Returns the text of `look_into`, see there."""
    return look_into(path, pattern=pattern)[0]


def look_into(path: str | os.PathLike[str], *, pattern: str | None = None) -> tuple[str, bool]:
    """Describes the checkpoint at `path`, or, for a run directory, makes a table of its checkpoints.

    With a `pattern` the newest checkpoint of a run directory is described.

    Every file is verified against the manifest.

    Args:
        path: Of a checkpoint, a run directory, or its folder of checkpoints.
        pattern: Lists the tensors whose names it matches (`re.search`), with the pieces of those that are stored in
            several; None lists none, "" all.

    Returns:
        The text, and whether all checkpoints are whole.

    Raises:
        CheckpointError: When there is no checkpoint, or the one that `path` names is damaged.
    """
    path = Path(path)
    for folder in (path / "checkpoints", path):
        steps = list_steps(folder)
        if steps and pattern is None and not (path / MANIFEST).exists():
            rows = [_row(folder / step_name(step)) for step in steps]
            return "\n".join(text for text, _ in rows), all(is_whole for _, is_whole in rows)
    opened = OpenCheckpoint(path)
    verify_files(opened.path, manifest=opened.manifest)
    sections = [_head(opened), _files(opened.manifest), _groups(opened)]
    if opened.manifest.metrics:
        sections.append("metrics\n" + "\n".join(f"  {k} {v:g}" for k, v in sorted(opened.manifest.metrics.items())))
    sections.append("state\n  " + (", ".join(sorted(opened.state)) or "empty"))
    if pattern is not None:
        sections.append(_tensors(opened, pattern=pattern))
    return "\n".join(sections), True


def _row(path: Path) -> tuple[str, bool]:
    """One line of the table, name, size, whether it is whole, and metrics; and whether it is whole."""
    try:
        manifest = read_manifest(path)
        verify_files(path, manifest=manifest)
    except CheckpointError as error:
        return f"{path.name}  damaged: {error}", False
    metrics = "  ".join(f"{name} {value:g}" for name, value in sorted(manifest.metrics.items()))
    return f"{path.name}  {_size(manifest)}  whole  {metrics}".rstrip(), True


def _head(opened: OpenCheckpoint) -> str:
    whole = f"{len(opened.manifest.files)} files, {_size(opened.manifest)}, all as in the manifest (size and SHA-256)"
    ranks = opened.manifest.ranks
    layout = opened.manifest.layout or "unknown"
    writer = f"written by {ranks} {'rank' if ranks == 1 else 'ranks'}, layout {layout}"
    return f"{opened.path}\nstep {opened.manifest.step}\n{writer}\n{whole}"


def _files(manifest: Manifest) -> str:
    rows = [f"  {digest.size:>15,}  {name}" for name, digest in sorted(manifest.files.items())]
    return "\n".join(["files", *rows])


def _groups(opened: OpenCheckpoint) -> str:
    """Counts tensors by the first component of their names, and the pieces that they are stored in."""
    groups: dict[str, list[int]] = {}
    pieces: dict[str, int] = {}
    for name, entry in opened.entries.items():
        group = name.split(".", 1)[0]
        groups.setdefault(group, []).append(math.prod(entry.size))
        pieces[group] = pieces.get(group, 0) + len(entry.chunks)
    rows = [
        f"  {group}  {len(sizes)} tensors, {sum(sizes):,} elements in {pieces[group]} pieces"
        for group, sizes in sorted(groups.items())
    ]
    return "\n".join(["tensors", *rows])


def _tensors(opened: OpenCheckpoint, *, pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"pattern: must be a regular expression, but is {pattern!r} ({error}). Write a dot as \\."
        ) from None
    names = [name for name in sorted(opened.entries) if compiled.search(name)]
    rows = []
    for name in names:
        entry = opened.entries[name]
        rows.append(f"  {name}  {str(entry.properties.dtype).removeprefix('torch.')} {list(entry.size)}")
        if len(entry.chunks) > 1:
            rows += [f"    {list(size)} at {list(start)}  {file}" for start, size, file in opened.chunks(name)]
    return "\n".join([f"tensors that match {pattern!r}: {len(names)}", *rows])


def _size(manifest: Manifest) -> str:
    return f"{sum(digest.size for digest in manifest.files.values()) / 1e6:,.1f} MB"
