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


def head_range(length: int, *, granule: int, parts: int, index: int) -> tuple[int, int]:
    """Returns (start, stop) of what rank `index` of `parts` holds of heads that are `length` elements together.

    Ranks hold equally many heads, or, where there are fewer heads than ranks, equally many ranks hold each head.

    Args:
        length: elements of all heads.
        granule: elements of one head.
        parts: ranks.
        index: of this rank.

    Raises:
        ValueError: neither number divides the other.
    """
    heads = length // granule
    if heads % parts == 0:
        return length * index // parts, length * (index + 1) // parts
    if parts % heads:
        raise ValueError(f"{parts} ranks and {heads} heads")
    head = index * heads // parts
    return head * granule, (head + 1) * granule


def shard_spec(spec: ParameterSpec, *, rules: Mapping[str, str], mesh: Mesh) -> Shard | None:
    """Returns what this rank holds of a parameter, None for all of it.

    Each fused part is divided as if it were a parameter of its own; the local tensor has the parts' blocks one after
    the other.

    Raises:
        ValueError: heads that cannot be divided.
    """
    axes: list[str] = [rules.get(axis or "", "") for axis in spec.axes]
    divided = [dim for dim, axis in enumerate(axes) if axis and mesh.size(axis) > 1]
    if not divided:
        return None

    def part_of(length: int, dim: int) -> tuple[int, int]:
        parts, index = mesh.size(axes[dim]), mesh.index(axes[dim])
        if spec.axes[dim] == "heads":
            return head_range(length, granule=spec.granule, parts=parts, index=index)
        return split_range(length, parts=parts, index=index)

    ranges = [part_of(size, dim) if dim in divided and dim else (0, size) for dim, size in enumerate(spec.shape)]
    boxes: list[Box] = []
    shared: list[bool] = []
    local = 0
    offset = 0
    for size in spec.parts or (spec.shape[0],):
        low, high = part_of(size, 0) if 0 in divided else (0, size)
        starts = (offset + low, *(start for start, _ in ranges[1:]))
        shape = (high - low, *(stop - start for start, stop in ranges[1:]))
        boxes.append(Box(start=starts, local_start=(local, *(0 for _ in ranges[1:])), size=shape))
        shared.append(0 in divided and spec.axes[0] == "heads" and size // spec.granule < mesh.size(axes[0]))
        local += high - low
        offset += size
    return Shard(
        axes=tuple(dict.fromkeys(axes[dim] for dim in divided)),
        boxes=tuple(boxes),
        local_shape=(local, *boxes[0].size[1:]),
        shared=tuple(shared),
    )
