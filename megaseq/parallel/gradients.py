"""Gradients over ranks: sums in flat buckets, and a norm that counts each element of the model once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import Box, ParameterSpec, shard_of

NORM_AXES = ("expert", "pipe", "tensor")
"""Axes along which ranks hold different parameters; along the others their gradients are equal after the sums."""

_Place = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, size) of a box in a global tensor."""
_Held = dict[str, list[_Place]]


def all_reduce_sum(tensor: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sums `tensor` over `group` in place and returns it; None is this process alone."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def buckets_of(tensors: Sequence[Tensor], *, bucket_elements: int) -> Iterator[list[Tensor]]:
    """Yields runs of tensors of one type that have at most `bucket_elements` together, or are a single larger one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > bucket_elements or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def sum_over(tensors: Sequence[Tensor], *, group: dist.ProcessGroup | None, bucket_elements: int) -> None:
    """Sums every tensor over the ranks of `group`, in place; all ranks pass the same shapes in the same order.

    One buffer is sent while the next is filled.

    Args:
        tensors: of any shapes.
        group: None is this process alone.
        bucket_elements: sent together, at most.
    """
    if group is None:
        return
    sent: list[tuple[dist.Work | None, Tensor, list[Tensor]]] = []
    for bucket in buckets_of(tensors, bucket_elements=bucket_elements):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            flat = bucket[0]
        else:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        sent.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
    for work, flat, bucket in sent:
        if work is not None:
            work.wait()
        if flat is not bucket[0]:
            views = torch.split(flat, [tensor.numel() for tensor in bucket])
            shaped = [view.view(tensor.shape) for view, tensor in zip(views, bucket, strict=True)]
            torch._foreach_copy_(bucket, shaped)


def is_expert(parameter: Tensor) -> bool:
    """Whether data-parallel ranks hold different parts of `parameter`: experts."""
    shard = shard_of(parameter)
    return shard is not None and "expert" in shard.axes


def counted_boxes(
    parameters: Mapping[str, Tensor], *, mesh: Mesh | None, axes: Sequence[str] = NORM_AXES
) -> dict[str, tuple[Box, ...] | None]:
    """Decides which part of each parameter this rank counts in sums over the model.

    What several ranks hold (a parameter that `tensor` does not divide, the copy of a tied matrix in another stage,
    key heads that ranks share) counts on the first of them alone. To be called by all ranks at the same time.

    Args:
        parameters: what this rank holds, with `.spec` and, where divided, `.shard`.
        mesh: None is one process.
        axes: of the ranks that each bring what they hold to the sum.

    Returns:
        By name: None for all of it, else the boxes that count, perhaps none.
    """
    group = mesh.group(*axes) if mesh is not None else None
    if mesh is None or group is None:
        return dict.fromkeys(parameters)
    own = {name: _global_boxes(parameter) for name, parameter in parameters.items()}
    gathered: list[_Held | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    place = dist.get_rank(group)
    earlier: dict[str, set[_Place]] = {}
    for held in gathered[:place]:
        for name, places in (held or {}).items():
            earlier.setdefault(name, set()).update(places)
    counted: dict[str, tuple[Box, ...] | None] = {}
    for name, parameter in parameters.items():
        taken = earlier.get(name, set())
        if not taken.intersection(own[name]):
            counted[name] = None
            continue
        shard = shard_of(parameter)
        boxes = shard.boxes if shard is not None else ()
        counted[name] = tuple(box for box in boxes if (box.start, box.size) not in taken)
    return counted


def _global_boxes(parameter: Tensor) -> list[_Place]:
    shard = shard_of(parameter)
    if shard is not None:
        return [(box.start, box.size) for box in shard.boxes]
    spec: ParameterSpec | None = getattr(parameter, "spec", None)
    shape = tuple(parameter.shape) if spec is None else spec.shape
    return [((0,) * len(shape), shape)]


def counted_views(boxes: Mapping[str, tuple[Box, ...] | None]) -> Callable[[str, Tensor], Sequence[Tensor]]:
    """Returns the function that cuts out of a gradient what `counted_boxes` said this rank counts."""

    def views(name: str, gradient: Tensor) -> Sequence[Tensor]:
        counted = boxes[name]
        return (gradient,) if counted is None else [box.of_local(gradient) for box in counted]

    return views


def squared_norm_reduction(mesh: Mesh | None) -> Callable[[Tensor], Tensor] | None:
    """Returns what sums a rank's squared norm over the ranks that hold other parameters; None where there is none."""
    group = mesh.group(*NORM_AXES) if mesh is not None else None
    if group is None:
        return None
    return lambda squared: all_reduce_sum(squared, group=group)


def names_of_all_stages(names: Sequence[str], *, mesh: Mesh | None) -> list[str]:
    """Returns the names of the parameters of all pipeline stages, in the stages' order; for all ranks to call."""
    group = mesh.group("pipe") if mesh is not None else None
    if group is None:
        return list(names)
    gathered: list[list[str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(names), group=group)
    return list(dict.fromkeys(name for held in gathered for name in held or ()))
