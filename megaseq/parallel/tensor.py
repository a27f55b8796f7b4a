"""Tensor and sequence parallelism: what ranks that share the matrices of a layer exchange, with its gradients.

Column-parallel maps have a part of their outputs on each rank, row-parallel ones of their inputs; a pair of them needs
one sum over ranks (Shoeybi et al. 2019, "Megatron-LM"). With sequence parallelism the ranks also share the tokens
between such pairs, and the sum becomes a reduce-scatter and an all-gather (Korthikanti et al. 2022).

Gradients are right without any further sum over the tensor ranks: those of what all ranks hold are the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megaseq.parallel.sharding import split_range

# Renamed in torch 2.13; the older names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup


def _sum(x: Tensor, *, group: Group) -> Tensor:
    """Returns the sum over ranks, in new memory."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _cut(x: Tensor, *, group: Group, dim: int) -> Tensor:
    """Returns this rank's of as many equal runs along `dim` as there are ranks."""
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size).contiguous()


def _join(x: Tensor, *, group: Group, dim: int) -> Tensor:
    """Returns the runs of all ranks along `dim`, one after the other."""
    return _join_later(x, group=group, dim=dim)()


def _join_later(x: Tensor, *, group: Group, dim: int) -> Callable[[], Tensor]:
    """Begins `_join`; returns what waits for it."""
    run = x.movedim(dim, 0).contiguous()
    joined = run.new_empty(run.shape[0] * dist.get_world_size(group), *run.shape[1:])
    work = _all_gather(joined, run, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return joined.movedim(0, dim).contiguous()

    return wait


def _sum_and_cut(x: Tensor, *, group: Group, dim: int) -> Tensor:
    """Returns this rank's run along `dim` of the sum over ranks."""
    return _sum_and_cut_later(x, group=group, dim=dim)()


def _sum_and_cut_later(x: Tensor, *, group: Group, dim: int) -> Callable[[], Tensor]:
    """Begins `_sum_and_cut`; returns what waits for it."""
    whole = x.movedim(dim, 0).contiguous()
    run = whole.new_empty(whole.shape[0] // dist.get_world_size(group), *whole.shape[1:])
    work = _reduce_scatter(run, whole, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return run.movedim(0, dim).contiguous()

    return wait


class _Copy(torch.autograd.Function):
    """The same on all ranks, used by each for its part: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], group=ctx.group), None


class _Sum(torch.autograd.Function):
    """Parts of a sum: each rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group=group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Cut(torch.autograd.Function):
    """From all on every rank to a run on each; gradients are joined, so that all ranks have all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _cut(x, group=group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _join(gradients[0], group=ctx.group, dim=ctx.dim), None, None


class _Join(torch.autograd.Function):
    """From a run on each rank to all on every one; what follows has partial gradients (summed), or the same on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, partial: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.partial = group, dim, partial
        return _join(x, group=group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        divide = _sum_and_cut if ctx.partial else _cut
        return divide(gradients[0], group=ctx.group, dim=ctx.dim), None, None, None


class _SumAndCut(torch.autograd.Function):
    """From parts of a sum on every rank to a run of the sum on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _sum_and_cut(x, group=group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _join(gradients[0], group=ctx.group, dim=ctx.dim), None, None


class _JoinedLinear(torch.autograd.Function):
    """A linear map of the ranks' tokens, all on every rank.

    Only this rank's tokens are kept for the backward pass, which joins them again while it computes the gradient of the
    input; that one is summed and cut while it computes the weight's (Korthikanti et al. 2022, section 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return functional.linear(_join(x, group=group, dim=1), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        x, weight = ctx.saved_tensors
        joined = _join_later(x, group=ctx.group, dim=1)
        of_input = _sum_and_cut_later(gradient @ weight, group=ctx.group, dim=1)
        flat, tokens = gradient.flatten(0, 1), joined().flatten(0, 1)
        of_weight = flat.t() @ tokens if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(dim=0) if ctx.needs_input_grad[2] else None
        return of_input(), of_weight, of_bias, None


class _SumShared(torch.autograd.Function):
    """A parameter of which some rows are also on other ranks: the gradients of these rows are summed."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Group, rows: Sequence[tuple[int, int, int]], total: int) -> Tensor:
        ctx.group, ctx.rows, ctx.total = group, rows, total
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        # All shared rows of the model's parameter, of which this rank knows its own: no groups of a few ranks needed.
        shared = gradient.new_zeros(ctx.total, *gradient.shape[1:])
        for local, place, count in ctx.rows:
            shared[place : place + count] = gradient[local : local + count]
        dist.all_reduce(shared, group=ctx.group)
        for local, place, count in ctx.rows:
            gradient[local : local + count] = shared[place : place + count]
        return gradient, None, None, None


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def copy_to(x: Tensor, *, group: Group | None) -> Tensor:
    """Returns `x`, which is the same on all ranks and which each uses for its part; its gradient is their sum."""
    return x if group is None else _apply(_Copy, x, group)


def sum_over_ranks(x: Tensor, *, group: Group | None) -> Tensor:
    """Returns the sum of what the ranks have; the gradient of each is that of the sum."""
    return x if group is None else _apply(_Sum, x, group)


def cut(x: Tensor, *, group: Group | None, dim: int) -> Tensor:
    """Returns this rank's run along `dim`, which the ranks divide, of what all have."""
    return x if group is None else _apply(_Cut, x, group, dim)


def join(x: Tensor, *, group: Group | None, dim: int, partial: bool) -> Tensor:
    """Returns the ranks' runs along `dim`, all on every rank.

    Args:
        x: this rank's run, as long as those of the others.
        group: the ranks.
        dim: along which they are joined.
        partial: whether what follows is divided over the ranks, so that gradients are summed, or the same on all.
    """
    return x if group is None else _apply(_Join, x, group, dim, partial)


def sum_and_cut(x: Tensor, *, group: Group | None, dim: int) -> Tensor:
    """Returns this rank's run along `dim`, which the ranks divide, of the sum of what they have."""
    return x if group is None else _apply(_SumAndCut, x, group, dim)


class Column:
    """Exchange of a map that has a part of its outputs here; see `megaseq.parallel.spec.Exchange`."""

    def __init__(self, ranks: TensorRanks, *, entered: bool) -> None:
        self._ranks, self._entered = ranks, entered

    def linear(self, x: Tensor, *, weight: Tensor, bias: Tensor | None, divided: bool) -> Tensor:
        """Returns this rank's outputs [B, T, part of F] of all tokens of `x` [B, t, D]."""
        if self._entered:
            return functional.linear(x, weight, bias)
        if not divided:
            return functional.linear(self._ranks.copy(x), weight, bias)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # which does not act inside an autograd function
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _apply(_JoinedLinear, x, weight, bias, self._ranks.group)

    def own(self, parameter: Tensor, *, divided: bool) -> Tensor:
        """Returns the parameter; rows that other ranks hold too (key heads) have gradients summed over these."""
        shared = shared_rows(parameter)
        return parameter if shared is None else _apply(_SumShared, parameter, self._ranks.group, *shared)


class Row:
    """Exchange of a map that reads a part of its inputs here; see `megaseq.parallel.spec.Exchange`."""

    def __init__(self, ranks: TensorRanks) -> None:
        self._ranks = ranks

    def linear(self, x: Tensor, *, weight: Tensor, bias: Tensor | None, divided: bool) -> Tensor:
        """Returns the outputs [B, T, D] of `x` [B, T, part of F], summed over ranks, or this rank's tokens of them."""
        y, group = functional.linear(x, weight), self._ranks.group
        y = sum_and_cut(y, group=group, dim=1) if divided else sum_over_ranks(y, group=group)
        return y if bias is None else y + bias.to(y.dtype)

    def own(self, parameter: Tensor, *, divided: bool) -> Tensor:
        """Returns the parameter: a bias, which is on all ranks and may be added to a part of the tokens."""
        return self._ranks.copy(parameter) if divided and parameter.dim() == 1 else parameter


def shared_rows(parameter: Tensor) -> tuple[list[tuple[int, int, int]], int] | None:
    """Returns which rows of a divided parameter other ranks hold too.

    Returns:
        None where there are none, else (local row, place among all rows of such parts, number of rows) of each part,
        and how many these rows are.
    """
    spec, shard = getattr(parameter, "spec", None), getattr(parameter, "shard", None)
    if spec is None or shard is None or not spec.parts or not any(shard.shared):
        return None
    rows, total = [], 0
    for part, box, shared, offset in zip(spec.parts, shard.boxes, shard.shared, _offsets(spec.parts), strict=True):
        if shared:
            rows.append((box.local_start[0], total + box.start[0] - offset, box.size[0]))
            total += part
    return (rows, total) if rows else None


def _offsets(parts: Sequence[int]) -> list[int]:
    return [sum(parts[:index]) for index in range(len(parts))]


class TensorRanks:
    """The ranks that share the matrices; see `megaseq.parallel.spec.Ranks`."""

    def __init__(self, *, group: Group, sequence: bool, divided: frozenset[str]) -> None:
        """Makes the exchange.

        Args:
            group: the tensor ranks.
            sequence: whether they share tokens too.
            divided: the logical axes that they share.
        """
        self.group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self.sequence = sequence
        self.divided = divided

    def column(self, *, entered: bool = False) -> Column:
        """Returns the exchange of a map that has a part of its outputs here; `entered`: its input has been copied."""
        return Column(self, entered=entered)

    def row(self) -> Row:
        """Returns the exchange of a map that reads a part of its inputs here."""
        return Row(self)

    def span(self, length: int) -> tuple[int, int]:
        """Returns (start, stop) of this rank's part of `length` elements."""
        return split_range(length, parts=self.size, index=self.index)

    def copy(self, x: Tensor) -> Tensor:
        """Returns `x`, the same on all ranks; its gradient is the sum of theirs."""
        return copy_to(x, group=self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of the ranks' `x`; the gradient of each is that of the sum."""
        return sum_over_ranks(x, group=self.group)

    def cut_tokens(self, x: Tensor) -> Tensor:
        """Returns this rank's tokens [B, T / ranks, D] of `x` [B, T, D]."""
        return cut(x, group=self.group, dim=1)

    def join_tokens(self, x: Tensor, *, partial: bool) -> Tensor:
        """Returns all tokens [B, T, D] of the ranks' `x` [B, T / ranks, D]; `partial` as of `join`."""
        return join(x, group=self.group, dim=1, partial=partial)

    @torch.no_grad()
    def gather(self, x: Tensor, *, length: int, dim: int) -> Tensor:
        """Returns all `length` elements along `dim`, of which each rank has its `span`; without gradient."""
        widths = [
            stop - start for start, stop in (split_range(length, parts=self.size, index=i) for i in range(self.size))
        ]
        own = x.detach().movedim(dim, 0).contiguous()
        padded = own.new_zeros(max(widths), *own.shape[1:])
        padded[: own.shape[0]] = own
        joined = own.new_empty(self.size * max(widths), *own.shape[1:])
        _all_gather(joined, padded, group=self.group)
        parts = [part[:width] for part, width in zip(torch.split(joined, max(widths)), widths, strict=True)]
        return torch.cat(parts).movedim(0, dim)

    @torch.no_grad()
    def total(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks in place, without gradient; returns it."""
        dist.all_reduce(x, group=self.group)
        return x

    @torch.no_grad()
    def maximum(self, x: Tensor) -> Tensor:
        """Takes the largest `x` of the ranks, element by element, in place, without gradient; returns it."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x
