"""The flat fp32 shares of DeepSpeed's ZeRO optimizers, and which elements of which parameters lie where in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megaseq.checkpoint.piece import Piece, fragment_pieces
from megaseq.parallel.spec import Box, Shard


@dataclass(frozen=True)
class Described:
    """What a parameter is, whatever of it lies in this process."""

    name: str
    """Logical."""
    shard: Shard | None
    """What the ranks that share it by ZeRO have of it together; None is all."""
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    """Of the tensor that ZeRO shares out."""


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of a flattened parameter, and where it lies in a share."""

    parameter: Described
    share: int
    """Index of the share."""
    offset: int
    """First element in the share."""
    first: int
    """First element in the parameter."""
    length: int
    """Elements; 0 where the parameter ends before this rank's part."""

    def of(self, flat: Tensor) -> Tensor:
        """Returns the view of the fragment in something that is laid out as its share: moments, say."""
        return flat.narrow(0, self.offset, self.length)

    def pieces(self, name: str, *, flat: Tensor) -> list[Piece]:
        """Returns the pieces of the logical tensor `name`, of the parameter's shape, that lie in `flat`."""
        return fragment_pieces(
            name, self.of(flat), first=self.first, shard=self.parameter.shard, global_shape=self.parameter.global_shape
        )

    def counted(self, gradient: Tensor, *, boxes: tuple[Box, ...] | None) -> Sequence[Tensor]:
        """Returns what of the fragment's gradient [length] this rank counts in the norm.

        Args:
            gradient: of the fragment.
            boxes: of the parameter, that count; None is all.
        """
        if boxes is None:
            return (gradient,)
        if not boxes:
            return ()
        shard = Shard(axes=(), boxes=boxes, local_shape=self.parameter.local_shape)
        found = fragment_pieces(
            self.parameter.name, gradient, first=self.first, shard=shard, global_shape=self.parameter.global_shape
        )
        return [piece.tensor for piece in found]


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a share, which are updated together."""

    share: int
    """Index of the share."""
    start: int
    stop: int

    def of(self, flat: Tensor) -> Tensor:
        """Returns the view of the run in something that is laid out as its share."""
        return flat[self.start : self.stop]

    def cut(self, fragment: Fragment, *, index: int) -> Fragment | None:
        """Returns what of a fragment of the share lies in the run, which is number `index`; None: nothing."""
        low = max(self.start, fragment.offset)
        high = min(self.stop, fragment.offset + fragment.length)
        if low >= high:
            return None
        first = fragment.first + low - fragment.offset
        return Fragment(fragment.parameter, share=index, offset=low - self.start, first=first, length=high - low)


def lies_in(piece: Piece, *, boxes: tuple[Box, ...] | None) -> bool:
    """Whether a piece of one of a parameter's boxes lies in one of some `boxes` of it; None is all."""
    return boxes is None or any(
        all(b <= a and a + n <= b + m for a, n, b, m in zip(piece.start, piece.size, box.start, box.size, strict=True))
        for box in boxes
    )


def runs_of(shares: Sequence[Tensor], *, limit: int) -> list[Run]:
    """Returns the runs of at most `limit` elements that shares consist of; 0: each is one."""
    return [
        Run(index, start=start, stop=min(start + (limit or share.numel()), share.numel()))
        for index, share in enumerate(shares)
        for start in range(0, share.numel(), limit or share.numel())
    ]


def fragments_of(optimizer: Any, *, stage: int, described: Mapping[int, Described]) -> list[list[Fragment]]:
    """Returns the fragments of each share of a ZeRO optimizer of DeepSpeed, in order.

    Args:
        optimizer: of `stage`.
        stage: 1 to 3.
        described: by `id` of the parameter.
    """
    fragments = _of_partitions(optimizer, described) if stage < 3 else _of_parameters(optimizer, described)
    return [list(row) for row in fragments]


def shares_of(optimizer: Any, *, stage: int) -> list[Tensor]:
    """Returns the flat fp32 tensors that this rank updates."""
    name = "single_partition_of_fp32_groups" if stage < 3 else "fp32_partitioned_groups_flat"
    shares: list[Tensor] = getattr(optimizer, name)
    return shares


def _of_partitions(optimizer: Any, described: Mapping[int, Described]) -> Iterator[list[Fragment]]:
    """Stages 1 and 2: each group is one flat tensor, divided into equal runs."""
    for share, parameters in enumerate(optimizer.round_robin_bit16_groups):
        size = int(optimizer.partition_size[share])
        start = size * dist.get_rank(optimizer.real_dp_process_group[share])
        row = []
        for parameter, place in zip(parameters, optimizer.round_robin_bit16_offsets[share], strict=True):
            low, high = max(place, start), min(place + parameter.numel(), start + size)
            if low < high:
                about = described[id(parameter)]
                row.append(Fragment(about, share=share, offset=low - start, first=low - place, length=high - low))
        yield row


def _of_parameters(optimizer: Any, described: Mapping[int, Described]) -> Iterator[list[Fragment]]:
    """Stage 3: each parameter is divided into equal runs; those of a group lie one after the other."""
    for share, parameters in enumerate(optimizer.fp16_groups):
        rank = dist.get_rank(optimizer.sub_group_process_groups[share])
        row, offset = [], 0
        for parameter in parameters:
            size = int(parameter.partition_numel())
            first = min(rank * size, int(parameter.ds_numel))
            length = min(size, int(parameter.ds_numel) - first)
            row.append(Fragment(described[id(parameter)], share=share, offset=offset, first=first, length=length))
            offset += size
        yield row
