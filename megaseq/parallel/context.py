"""Context parallelism: ranks share the tokens of each row, so that rows may be longer than one rank has room for.

A row is padded to 2C chunks of one length, of which rank c of C has the c-th and the c-th from the end: of causal
attention, to which early tokens are little work and late ones much, each rank then has the same share. Attention is
the only place where ranks need each other: keys and values travel around the ranks (`ring`), or tokens are exchanged
for heads before and after it (`ulysses`, Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megaseq.base import NestedMap
from megaseq.parallel.mesh import Mesh

Method = Literal["ring", "ulysses"]

SIDES = ("source", "target")
"""What of a batch has rows of tokens."""


class ContextRanks:
    """The ranks that share rows; see `megaseq.parallel.spec.ContextRanks`."""

    def __init__(self, *, group: dist.ProcessGroup, method: Method) -> None:
        self.group = group
        self.method = method
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self._next = dist.get_global_rank(group, (self.index + 1) % self.size)
        self._previous = dist.get_global_rank(group, (self.index - 1) % self.size)

    def places(self, length: int, *, device: torch.device) -> Tensor:
        """Returns the places, int64 [t], of this rank's tokens in a row of `length`, those of padding included."""
        return _places(length, index=self.index, size=self.size, device=device)

    def padded(self, length: int) -> int:
        """Returns the length of a row of `length` tokens with what pads it."""
        return padded_length(length, ranks=self.size)

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begins to send tensors to the next rank and to receive the like from the one before.

        Returns:
            What waits for the end of both, and returns what came.
        """
        sent = [tensor.contiguous() for tensor in tensors]
        came = [torch.empty_like(tensor) for tensor in sent]
        operations = [dist.P2POp(dist.isend, tensor, self._next, self.group) for tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, self._previous, self.group) for tensor in came]
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            # What is sent must live until it has been.
            for work in works:
                work.wait()
            sent.clear()
            return came

        return wait

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """Exchanges tokens for heads: of [B, t, N, H] to [B, L, N / ranks, H], all tokens in order."""
        dealt = _exchange(_divided(x, dim=2, parts=self.size), group=self.group)
        return dealt.movedim(0, 1).flatten(1, 2).index_select(1, self._order(dealt, inverse=True))

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """Exchanges heads for tokens, the other way round: of [B, L, N / ranks, H] to [B, t, N, H]."""
        ordered = x.index_select(1, self._order(_divided(x, dim=1, parts=self.size)))
        dealt = _exchange(_divided(ordered, dim=1, parts=self.size), group=self.group)
        return dealt.movedim(0, 2).flatten(2, 3)

    def _order(self, dealt: Tensor, *, inverse: bool = False) -> Tensor:
        """Returns the places [L] of the tokens of all ranks, one rank after the other, or where each place stands.

        Args:
            dealt: [ranks, B, t, ...], gives t and the device.
            inverse: whether to return the latter.
        """
        length = dealt.shape[2] * self.size
        order = torch.cat(
            [_places(length, index=index, size=self.size, device=dealt.device) for index in range(self.size)]
        )
        return order.argsort() if inverse else order

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of the ranks' `x`, without gradient."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total


class _Exchange(torch.autograd.Function):
    """Part r of `x` [ranks, ...] goes to rank r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        came = torch.empty_like(x)
        dist.all_to_all_single(came, x, group=group)
        return came

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], group=ctx.group), None


def _exchange(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    result: Tensor = _Exchange.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def _divided(x: Tensor, *, dim: int, parts: int) -> Tensor:
    """Returns equal runs of `x` along `dim`, one after the other in a new first dimension."""
    return torch.stack(torch.chunk(x, parts, dim=dim))


def padded_length(length: int, *, ranks: int) -> int:
    """Returns the length of a row of `length` tokens that `ranks` share: a multiple of two chunks a rank."""
    return -(-length // (2 * ranks)) * 2 * ranks


def _places(length: int, *, index: int, size: int, device: torch.device) -> Tensor:
    chunk = padded_length(length, ranks=size) // (2 * size)
    run = torch.arange(chunk, device=device)
    return torch.cat([index * chunk + run, (2 * size - 1 - index) * chunk + run])


def shard_batch(batch: NestedMap, *, mesh: Mesh | None) -> NestedMap:
    """Leaves of every row what this rank has of it; `batch` itself where rows are not shared.

    Args:
        batch: `source` and `target` or one of them, whole rows: tensors [B, length, ...].
        mesh: where this process stands.

    Returns:
        The sides' tensors cut along the tokens, and in each side `row_segment_ids` [B, length] of the whole rows, by
        which layers know that rows are shared. Positions stay those of the whole row.
    """
    if mesh is None or mesh.size("context") == 1:
        return batch
    shared = NestedMap(batch)
    for name in SIDES:
        if name in batch:
            shared[name] = _shard_side(batch[name], mesh=mesh)
    return shared


def _shard_side(side: NestedMap, *, mesh: Mesh) -> NestedMap:
    index, size = mesh.index("context"), mesh.size("context")
    whole = _complete(side)
    length = whole.segment_ids.shape[1]
    padding = padded_length(length, ranks=size) - length
    places = _places(length, index=index, size=size, device=whole.segment_ids.device)

    def cut(tensor: Tensor) -> Tensor:
        # The padding's last dimensions come first: nothing is added after the tokens' dimension.
        filled = functional.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, padding]) if padding else tensor
        return filled.index_select(1, places)

    shared: NestedMap = whole.transform(cut)
    shared.row_segment_ids = whole.segment_ids
    return shared


def _complete(side: NestedMap) -> NestedMap:
    """Returns a side with segment ids and positions, which can no longer be told from a part of a row."""
    whole = NestedMap(side)
    like = side.ids if "ids" in side else next(tensor[..., 0] for tensor in side.flatten() if tensor.dim() > 2)
    if whole.get("segment_ids") is None:
        whole.segment_ids = torch.ones(like.shape, dtype=torch.int64, device=like.device)
    if whole.get("positions") is None:
        ids = whole.segment_ids
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        whole.positions = places - torch.where(begins, places, 0).cummax(dim=1).values
    return whole


@runtime_checkable
class _SharesRows(Protocol):
    """A layer that must know that ranks share rows."""

    def share_rows(self, ranks: ContextRanks) -> None: ...


def install_context(task: nn.Module, *, mesh: Mesh, method: Method) -> None:
    """Tells the layers of `task` which ranks share the rows of batches that `shard_batch` made; others stay whole.

    Raises:
        ParamsError: a layer cannot work on a part of a row.
    """
    group = mesh.group("context")
    if group is None:
        return
    ranks = ContextRanks(group=group, method=method)
    for module in task.modules():
        if isinstance(module, _SharesRows):
            module.share_rows(ranks)
