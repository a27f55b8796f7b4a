"""Sums of gradients over ranks that begin in the backward pass: each bucket is sent when the last of it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.parallel.gradients import buckets_of

ALIGNMENT = 16
"""Elements: gradients begin at multiples of it in a bucket, so that kernels can read them in wide words."""

OVERLAPPED_BUCKETS = 8
"""At least so many are made of a large model where they are sent during the backward pass: the last one cannot be."""
SMALLEST_BUCKET = 1 << 18
"""Elements below which a bucket is not made smaller for that: a message has a cost of its own."""


def overlapped_bucket(num_elements: int, *, bucket_elements: int) -> int:
    """Returns the elements of a bucket where `num_elements` in all are summed during the backward pass."""
    return min(bucket_elements, max(SMALLEST_BUCKET, -(-num_elements // OVERLAPPED_BUCKETS)))


@dataclass
class _Bucket:
    """Gradients that are sent together."""

    names: tuple[str, ...]
    missing: int = 0
    """Of them, in the pass that goes on."""
    is_sent: bool = False


class GradientSums:
    """Sums the gradients of some tensors over the ranks of a group.

    Buckets are filled from the last tensor to the first, about the order in which a backward pass makes gradients, and
    sent one after the other; in which order, the group learns from the first pass of its first rank. What is in a
    bucket, and so how its sums are rounded, does not depend on that.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        group: dist.ProcessGroup,
        bucket_elements: int,
        collect: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> None:
        """Makes the buckets; all ranks of the group pass the same names and shapes in the same order.

        Args:
            tensors: by name; their `.grad` are summed.
            group: of several ranks.
            bucket_elements: sent together, at most, unless a tensor alone has more.
            collect: called with names before their `.grad` are read, which may be elsewhere until then.
        """
        self._tensors = dict(tensors)
        self._group = group
        self._collect = collect
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._buckets = [
            _Bucket(tuple(names[id(tensor)] for tensor in bucket))
            for bucket in buckets_of(list(tensors.values())[::-1], bucket_elements=bucket_elements)
        ]
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.names}
        self._order = list(self._buckets)
        self._completed: list[int] | None = None
        """Numbers of the buckets as the first pass that is watched completes them; None before it and after it."""
        self._sent: list[tuple[dist.Work | None, Tensor]] = []
        self._active = False

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Lets backward passes between `begin` and `finish` send buckets.

        Args:
            parameters: leaves of the graph whose gradients those of the tensors are made of, by the same names.
        """
        self._completed = []
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            if self._active:
                self._note(name)

        return ready

    def begin(self) -> None:
        """To be called before the backward pass that makes the last of the gradients."""
        self._sent.clear()
        for bucket in self._buckets:
            bucket.missing, bucket.is_sent = len(bucket.names), False
        self._active = True

    def _note(self, name: str) -> None:
        """Takes down that a gradient is complete, and sends the buckets whose turn has come."""
        bucket = self._bucket_of[name]
        bucket.missing -= 1
        if bucket.missing:
            return
        if self._completed is not None:
            self._completed.append(self._buckets.index(bucket))
        # In one order on all ranks, whatever the order in which each of them is done.
        for turn in self._order:
            if turn.missing > 0:
                return
            if not turn.is_sent:
                self._send(turn)

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        bucket.is_sent = True
        self._collect(bucket.names)
        tensors = [self._tensors[name] for name in bucket.names]
        gradients = [tensor.grad for tensor in tensors]
        alone = len(tensors) == 1
        if alone and gradients[0] is not None and gradients[0].is_contiguous():
            flat = gradients[0]
        else:
            # One alone has no padding: ranks that send it as it is have none.
            step = 1 if alone else ALIGNMENT
            places = [-(-tensor.numel() // step) * step for tensor in tensors]
            flat = torch.empty(sum(places), dtype=tensors[0].dtype, device=tensors[0].device)
            runs = torch.split(flat, places)
            views = [run[: tensor.numel()].view(tensor.shape) for run, tensor in zip(runs, tensors, strict=True)]
            present = [(view, grad) for view, grad in zip(views, gradients, strict=True) if grad is not None]
            if present:
                torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
            for tensor, view, gradient in zip(tensors, views, gradients, strict=True):
                if gradient is None:  # A tensor that had no part in the loss on this rank.
                    view.zero_()
                # The bucket is what is left of the gradient, so that both are there for a moment only.
                tensor.grad = view
        self._sent.append((dist.all_reduce(flat, group=self._group, async_op=True), flat))

    def finish(self) -> None:
        """Sends what no backward pass has sent, and waits for all sums, which are then the tensors' `.grad`."""
        if not self._active:
            self.begin()
        self._active = False
        for bucket in self._order:
            if not bucket.is_sent:
                self._send(bucket)
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()
        if self._completed is not None:
            self._learn_order(self._completed)

    def _learn_order(self, completed: list[int]) -> None:
        """Takes over the order of the group's first rank, once."""
        rest = [number for number in range(len(self._buckets)) if number not in completed]
        device = next(iter(self._tensors.values())).device
        order = torch.tensor([*completed, *rest], device=device)
        dist.broadcast(order, src=dist.get_global_rank(self._group, 0), group=self._group)
        self._order = [self._buckets[number] for number in order.tolist()]
        self._completed = None
