"""Expert parallelism: pairs of a token and an expert travel to the rank that holds the expert, and back.

Lepikhin et al. 2020, "GShard"; no pair is dropped and none is padded: what ranks exchange has the sizes that the router
decided on, which they tell each other first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaseq.parallel.mesh import Mesh


def _exchange(x: Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Returns what all ranks sent here, in the order of the ranks; `send` rows of `x` go to each."""
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    """Rows go to other ranks; their gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = (send, receive, group)
        return _exchange(x, send=send, receive=receive, group=group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.splits
        return _exchange(gradients[0], send=receive, receive=send, group=group), None, None, None


def all_to_all(x: Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends the first `send[0]` rows of `x` to rank 0 of the group, the next ones to rank 1, and so on.

    Args:
        x: [sum of send, ...].
        send: rows for each rank.
        receive: rows from each rank.
        group: the ranks.

    Returns:
        [sum of receive, ...], in the order of the ranks. Its gradient goes back the same way.
    """
    result: Tensor = _AllToAll.apply(x, send, receive, group)  # type: ignore[no-untyped-call]
    return result


class Trip:
    """Pairs of several ranks at the rank that holds their experts; see `megaseq.layers.moe.Trip`."""

    def __init__(self, x: Tensor, *, counts: Tensor, names: Tensor, group: dist.ProcessGroup) -> None:
        ranks = dist.get_world_size(group)
        by_rank = counts.view(ranks, -1)
        arriving = torch.empty_like(by_rank)
        dist.all_to_all_single(arriving, by_rank.contiguous(), group=group)
        self._group = group
        # The host must know all sizes: it is here that it waits for the router.
        sizes = torch.stack([by_rank.sum(dim=1), arriving.sum(dim=1)]).tolist()
        self._send, self._receive = sizes[0], sizes[1]
        self.counts: list[int] = arriving.sum(dim=0).tolist()
        local = torch.arange(by_rank.shape[1], device=x.device).repeat(ranks)
        experts = local.repeat_interleave(arriving.flatten(), output_size=sum(self._receive))
        order = experts.argsort(stable=True)
        self._inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        came = all_to_all(x, send=self._send, receive=self._receive, group=group)
        self.x = came.index_select(0, order)
        self.names = _exchange(names, send=self._send, receive=self._receive, group=group)[order]

    def back(self, y: Tensor) -> Tensor:
        """Returns the results of the pairs that this rank sent, in their order; `y` are those of the pairs here."""
        return all_to_all(y.index_select(0, self._inverse), send=self._receive, receive=self._send, group=self._group)


class Share:
    """This rank's share of pairs that all ranks have alike, in place of a `Trip`; without gradient."""

    def __init__(self, x: Tensor, *, counts: Tensor, names: Tensor, group: dist.ProcessGroup) -> None:
        self._group, self._shape = group, x.shape
        listed = counts.view(dist.get_world_size(group), -1).tolist()
        self.counts: list[int] = listed[dist.get_rank(group)]
        start = sum(map(sum, listed[: dist.get_rank(group)]))
        self._own = slice(start, start + sum(self.counts))
        self.x, self.names = x[self._own], names[self._own]

    def back(self, y: Tensor) -> Tensor:
        """Returns the results of all pairs, the same to the last bit on all ranks."""
        whole = y.new_zeros(self._shape)
        whole[self._own] = y
        dist.all_reduce(whole, group=self._group)
        return whole


class ExpertRanks:
    """The ranks that share experts; see `megaseq.layers.moe.ExpertRanks`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.alike = False
        """Whether all ranks have the same tokens now, see `same_tokens`."""

    def send(self, x: Tensor, *, counts: Tensor, names: Tensor) -> Trip | Share:
        """Sends pairs `x` [A, D], sorted by expert, `counts` [E] of each, to the ranks of their experts."""
        kind = Share if self.alike else Trip
        return kind(x, counts=counts, names=names, group=self.group)


@contextlib.contextmanager
def same_tokens(task: nn.Module) -> Iterator[None]:
    """Within it the ranks that share the experts of `task` have the same tokens, as in decoding.

    They then take as many steps as each other, because what they compute is the same to the last bit: the results of
    an expert come from the rank that holds it, whatever else that rank multiplies it with.
    """
    found = {id(m.expert_ranks): m.expert_ranks for m in task.modules() if isinstance(m, _Mixture)}
    ranks = [each for each in found.values() if each is not None]
    for each in ranks:
        each.alike = True
    try:
        yield
    finally:
        for each in ranks:
            each.alike = False


@runtime_checkable
class _Mixture(Protocol):
    """A layer with experts."""

    expert_ranks: ExpertRanks | None


def install_experts(task: nn.Module, *, mesh: Mesh) -> None:
    """Tells all layers of `task` that have experts, each a part of them here, where the others are."""
    group = mesh.group("expert")
    if group is None:
        return
    ranks = ExpertRanks(group)
    for module in task.modules():
        if isinstance(module, _Mixture):
            module.expert_ranks = ranks
