"""Which block of each parameter a rank holds: logical axes of parameters to axes of the mesh."""

from __future__ import annotations

from collections.abc import Mapping

from megaseq.base.errors import ParamsError, must
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import Box, ParameterSpec, Shard

DEFAULT_RULES: dict[str, str] = {"vocab": "tensor", "heads": "tensor", "hidden": "tensor", "expert": "expert"}
"""Mesh axis of each logical axis that is divided; the others are whole on every rank."""


def merged_rules(overrides: Mapping[str, str]) -> dict[str, str]:
    """Returns the rule table with a user's rows in it; `none` takes a row out.

    Raises:
        ParamsError: a row that no parameter or no mesh has.
    """
    rules = {**DEFAULT_RULES, **overrides}
    for logical, mesh_axis in overrides.items():
        if logical not in DEFAULT_RULES or mesh_axis not in ("tensor", "expert", "none"):
            raise must(
                f"parallel.rules.{logical}",
                f"be tensor, expert or none for one of {sorted(DEFAULT_RULES)}",
                mesh_axis,
                "Correct the row",
                kind=ParamsError,
            )
    return {logical: axis for logical, axis in rules.items() if axis != "none"}


def split_range(length: int, *, parts: int, index: int) -> tuple[int, int]:
    """Returns (start, stop) of part `index` of `length` elements in `parts` that differ by one at most."""
    return length * index // parts, length * (index + 1) // parts


def shard_spec(spec: ParameterSpec, *, rules: Mapping[str, str], mesh: Mesh) -> Shard | None:
    """Returns what this rank holds of a parameter, None for all of it.

    Each fused part is divided as if it were a parameter of its own; the local tensor has the parts' blocks one after
    the other.
    """
    axes: list[str] = [rules.get(axis or "", "") for axis in spec.axes]
    divided = [dim for dim, axis in enumerate(axes) if axis and mesh.size(axis) > 1]
    if not divided:
        return None
    ranges: list[tuple[int, int]] = [(0, size) for size in spec.shape]
    for dim in divided:
        if dim == 0 and spec.parts:
            continue
        ranges[dim] = split_range(spec.shape[dim], parts=mesh.size(axes[dim]), index=mesh.index(axes[dim]))
    boxes: list[Box] = []
    local = 0
    offset = 0
    for size in spec.parts or (spec.shape[0],):
        start, stop = ranges[0] if not spec.parts else (offset, offset + size)
        if spec.parts and 0 in divided:
            low, high = split_range(size, parts=mesh.size(axes[0]), index=mesh.index(axes[0]))
            start, stop = offset + low, offset + high
        first = (start, *(low for low, _ in ranges[1:]))
        shape = (stop - start, *(high - low for low, high in ranges[1:]))
        boxes.append(Box(start=first, local_start=(local, *(0 for _ in ranges[1:])), size=shape))
        local += stop - start
        offset += size
    return Shard(
        axes=tuple(dict.fromkeys(axes[dim] for dim in divided)),
        boxes=tuple(boxes),
        local_shape=(local, *boxes[0].size[1:]),
    )
