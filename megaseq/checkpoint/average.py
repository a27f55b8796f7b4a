"""The mean of the parameters of several checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.directory import list_steps, step_name
from megaseq.checkpoint.piece import Part, whole_piece
from megaseq.checkpoint.reading import OpenCheckpoint
from megaseq.checkpoint.safetensors_file import export_safetensors
from megaseq.checkpoint.writing import Content, encode_state, write_checkpoint

Weights = Literal["auto", "parameters", "ema"]
"""Which values: the parameters, their moving averages, or the latter where there are any."""

EMA_PREFIX = "ema."
STATE_PREFIXES = ("learner.", EMA_PREFIX)


def average(paths: Sequence[str | os.PathLike[str]], *, weights: Weights = "auto") -> dict[str, Tensor]:
    """Returns the mean of the parameters over several checkpoints (one is allowed: then its parameters).

    Sums are kept in float64, one tensor at a time. Integer tensors are taken from the last. A parameter without a
    moving average (a frozen one) is taken as it is.

    Args:
        paths: Of checkpoints or run directories.
        weights: "ema" averages the moving averages, "parameters" the parameters, "auto" the moving averages if all
            have them.

    Raises:
        CheckpointError: When the checkpoints are not of the same parameters, or have no moving averages for "ema".
    """
    if not paths:
        raise CheckpointError("average: must get at least one checkpoint, but has none. Name the checkpoints.")
    opened = [OpenCheckpoint(path, prefixes=None) for path in paths]
    names = parameter_names(opened[0])
    for other in opened[1:]:
        _check_same(opened[0], other, names=names)
    sources = weight_sources(opened, names=names, weights=weights)
    result: dict[str, Tensor] = {}
    for name in names:
        source = sources[name]
        last = opened[-1].read([source])[source]
        if not last.is_floating_point() or len(opened) == 1:
            result[name] = last
            continue
        total = last.to(torch.float64)
        for checkpoint in opened[:-1]:
            total += checkpoint.read([source])[source]
        result[name] = (total / len(opened)).to(last.dtype)
    return result


def newest(path: str | os.PathLike[str], *, count: int) -> list[Path]:
    """Returns the `count` newest checkpoints of a run directory, or of its folder of checkpoints, oldest first.

    Raises:
        CheckpointError: When there are fewer.
    """
    folder = Path(path)
    if list_steps(folder / "checkpoints"):
        folder = folder / "checkpoints"
    steps = list_steps(folder)
    if count < 1 or len(steps) < count:
        raise CheckpointError(
            f"{path}: must have {count} checkpoints to average, but has {len(steps)}. Keep more, or average fewer."
        )
    return [folder / step_name(step) for step in steps[-count:]]


def write_average(
    paths: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str], weights: Weights = "auto"
) -> Path:
    """Writes the average of checkpoints to `output`; returns its path.

    A name that ends in .safetensors becomes one such file. Any other becomes a checkpoint with the averaged parameters,
    and the state and files of the last one, that decodes, evaluates and exports like any, but does not resume training.

    Raises:
        CheckpointError: When `output` exists, or see `average`.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output}: must not exist, but does. Name another output.")
    tensors = average(paths, weights=weights)
    if output.suffix == ".safetensors":
        export_safetensors(tensors, output)
        return output
    last = OpenCheckpoint(paths[-1])
    steps = [OpenCheckpoint(path, prefixes=()).manifest.step for path in paths]
    content = Content(
        step=last.manifest.step,
        parts=[Part.of(whole_piece(name, tensor)) for name, tensor in tensors.items()],
        state=encode_state({**last.state, "average": {"steps": steps, "weights": weights}}),
        files=last.files,
        metrics={},
    )
    write_checkpoint(output, content=content, check_finite=True)
    return output


def parameter_names(opened: OpenCheckpoint) -> list[str]:
    """Returns the names of the model's tensors, without the learner's."""
    return [name for name in opened.entries if not name.startswith(STATE_PREFIXES)]


def weight_sources(opened: Sequence[OpenCheckpoint], *, names: Sequence[str], weights: Weights) -> dict[str, str]:
    """Returns the stored name to read for each parameter.

    Raises:
        CheckpointError: When moving averages are asked for and there are none.
    """
    averaged = {name for name in names if all(EMA_PREFIX + name in checkpoint.entries for checkpoint in opened)}
    if weights == "ema" and not averaged:
        raise CheckpointError(
            f"{opened[0].path}: must have moving averages, but has none. Use weights=parameters, or train with "
            f"learner.ema."
        )
    if weights == "parameters":
        averaged = set()
    return {name: EMA_PREFIX + name if name in averaged else name for name in names}


def _check_same(first: OpenCheckpoint, other: OpenCheckpoint, *, names: Sequence[str]) -> None:
    different = sorted(set(names) ^ set(parameter_names(other)))
    different += [
        name for name in names if name in other.entries and other.entries[name].size != first.entries[name].size
    ]
    if different:
        raise CheckpointError(
            f"{other.path}: must have the parameters of {first.path}, but {different[0]} differs. Average one "
            f"run's checkpoints."
        )
