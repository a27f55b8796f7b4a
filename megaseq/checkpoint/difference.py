"""What differs between two checkpoints, whatever layouts wrote them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.reading import OpenCheckpoint


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How far one tensor lies from that of the same name."""

    name: str
    max_absolute: float
    """Largest |a - b|; inf where only one of them is finite."""
    max_relative: float
    """`max_absolute` over the largest |a|."""
    num_different: int
    """Elements."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """All that differs between two checkpoints."""

    paths: tuple[str, str]
    steps: tuple[int, int]
    num_equal: int
    """Tensors that are equal bit by bit."""
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Names that only the first has, and only the second."""
    unlike: tuple[str, ...]
    """A line for each tensor of another shape or type."""
    tensors: tuple[TensorDifference, ...]
    """Those with other values, the largest relative difference first."""

    def __bool__(self) -> bool:
        return bool(self.only[0] or self.only[1] or self.unlike or self.tensors)

    def text(self, *, limit: int = 20) -> str:
        """Returns a table with at most `limit` lines of each kind."""
        lines = [f"{path}  step {step}" for path, step in zip(self.paths, self.steps, strict=True)]
        lines.append(f"{self.num_equal} tensors are equal, {len(self.tensors)} have other values")
        for path, names in zip(self.paths, self.only, strict=True):
            lines += _section(f"only in {path}", names, limit=limit)
        lines += _section("of another shape or type", self.unlike, limit=limit)
        width = max((len(one.name) for one in self.tensors[:limit]), default=0)
        rows = [
            f"{one.name:<{width}}  {one.max_absolute:10.3e}  {one.max_relative:10.3e}  {one.num_different:,}"
            for one in self.tensors
        ]
        heading = f"{'other values':<{width + 2}}  {'max abs':>10}  {'max rel':>10}  elements"
        return "\n".join(lines + _section(heading, rows, limit=limit, counted=False))


def _section(heading: str, rows: Sequence[str], *, limit: int, counted: bool = True) -> list[str]:
    if not rows:
        return []
    more = [f"  and {len(rows) - limit} more"] if len(rows) > limit else []
    return [f"{heading}: {len(rows)}" if counted else heading, *(f"  {row}" for row in rows[:limit]), *more]


def difference(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, pattern: str | None = None
) -> Difference:
    """Compares the tensors of two checkpoints, one at a time.

    Args:
        first: Checkpoint or run directory, whose newest is meant.
        second: Likewise.
        pattern: Compares only tensors whose names it matches (`re.search`).

    Raises:
        CheckpointError: When one is damaged, or the pattern is no regular expression.
    """
    a, b = OpenCheckpoint(first), OpenCheckpoint(second)
    try:
        compiled = re.compile(pattern or "")
    except re.error as error:
        raise CheckpointError(
            f"pattern: must be a regular expression, but is {pattern!r} ({error}). Write a dot as \\."
        ) from None
    mine, others = ([name for name in sorted(one.entries) if compiled.search(name)] for one in (a, b))
    unlike: list[str] = []
    found: list[TensorDifference] = []
    num_equal = 0
    for name in sorted(set(mine) & set(others)):
        kinds = [
            f"{str(e.properties.dtype).removeprefix('torch.')} {list(e.size)}"
            for e in (a.entries[name], b.entries[name])
        ]
        if kinds[0] != kinds[1]:
            unlike.append(f"{name}  {kinds[0]} and {kinds[1]}")
            if a.entries[name].size != b.entries[name].size:
                continue
        one = _compare(name, a.read([name])[name], b.read([name])[name])
        if one is not None:
            found.append(one)
        elif kinds[0] == kinds[1]:
            num_equal += 1
    return Difference(
        paths=(str(a.path), str(b.path)),
        steps=(a.manifest.step, b.manifest.step),
        num_equal=num_equal,
        only=(tuple(n for n in mine if n not in b.entries), tuple(n for n in others if n not in a.entries)),
        unlike=tuple(unlike),
        tensors=tuple(sorted(found, key=lambda one: (-one.max_relative, one.name))),
    )


def _compare(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """Returns how the tensors differ, None where all elements are equal; nan equals nan."""
    x, y = a.double(), b.double()
    # Integers beyond 2**53 are not told apart as doubles.
    equal = a == b if a.dtype == b.dtype else x == y
    different = ~(equal | (x.isnan() & y.isnan()))
    count = int(different.sum())
    if count == 0:
        return None
    gaps = torch.nan_to_num((x - y).abs()[different], nan=math.inf, posinf=math.inf)
    largest = float(gaps.max())
    finite = x[x.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    relative = largest / scale if scale else math.inf
    return TensorDifference(name, max_absolute=largest, max_relative=relative, num_different=count)
