"""Writing a checkpoint anew: in one file, by one rank, or with other number types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.average import STATE_PREFIXES, Weights, weight_sources
from megaseq.checkpoint.piece import Outline, Part
from megaseq.checkpoint.reading import OpenCheckpoint
from megaseq.checkpoint.safetensors_file import TensorEntry, export_entries
from megaseq.checkpoint.writing import Content, encode_state, write_checkpoint

NumberType = Literal["float32", "bfloat16", "float16"]
"""What tensors of floating point become."""

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def convert(
    path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    weights: Weights | Literal["all"] = "auto",
    dtype: NumberType | None = None,
) -> Path:
    """Writes a checkpoint of any layout as one process would have; returns the new path. One tensor at a time is read.

    A name that ends in .safetensors becomes one such file, with the weights. Any other becomes a checkpoint: with
    `weights="all"` it has all of the state and resumes training; otherwise it has the weights, and evaluates, decodes
    and exports.

    Args:
        path: Of a checkpoint, or of a run directory, whose newest is meant.
        output: Must not exist.
        weights: "parameters", their moving averages ("ema"), the latter where there are any ("auto"), or "all" that
            there is, under its own name.
        dtype: Of weights of floating point; None leaves all as they are.

    Raises:
        CheckpointError: When `output` exists, the checkpoint is damaged or lacks what is asked for, or a dtype is
            asked for with "all": training goes on from what was saved, not from what was rounded.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output}: must not exist, but does. Name another output.")
    if weights == "all" and (dtype is not None or output.suffix == ".safetensors"):
        what = "a number type" if dtype is not None else "one file"
        raise CheckpointError(
            f"weights: must be auto, parameters or ema for {what}, but is 'all'. Training resumes only from all of "
            "its state in the type that it had."
        )
    opened = OpenCheckpoint(path)
    sources = (
        {name: name for name in opened.entries}
        if weights == "all"
        else weight_sources(
            [opened], names=[n for n in opened.entries if not n.startswith(STATE_PREFIXES)], weights=weights
        )
    )
    entries = [_entry(opened, name=name, source=source, dtype=dtype) for name, source in sources.items()]
    if output.suffix == ".safetensors":
        export_entries(entries, output)
        return output
    content = Content(
        step=opened.manifest.step,
        parts=[_part(entry) for entry in entries],
        state=encode_state(opened.state),
        files=opened.files,
        metrics=opened.manifest.metrics,
        layout="one process",
    )
    write_checkpoint(output, content=content, check_finite=False)
    return output


def _entry(opened: OpenCheckpoint, *, name: str, source: str, dtype: NumberType | None) -> TensorEntry:
    stored = opened.entries[source]
    own: torch.dtype = stored.properties.dtype
    wanted = DTYPES[dtype] if dtype is not None and own.is_floating_point else own
    return TensorEntry(name=name, dtype=wanted, shape=tuple(stored.size), resolve=_reader(opened, source, wanted))


def _reader(opened: OpenCheckpoint, source: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        value = opened.read([source])[source]
        converted = value.to(dtype)
        if dtype != value.dtype and not torch.equal(converted.isfinite(), value.isfinite()):
            raise CheckpointError(
                f"{opened.path} {source}: must fit into {str(dtype).removeprefix('torch.')}, but has values beyond it. "
                "Use bfloat16."
            )
        return converted

    return read


def _part(entry: TensorEntry) -> Part:
    start = (0,) * len(entry.shape)
    return Part(
        outline=Outline(entry.name, global_shape=entry.shape, start=start, size=entry.shape, dtype=entry.dtype),
        values=entry.resolve,
    )
