"""Plans for torch.distributed.checkpoint made from pieces instead of its own tensor types."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.piece import Outline, Part, Piece
from megaseq.checkpoint.tiling import check_outlines


class PieceSavePlanner(SavePlanner):
    """Plans the writing of the parts of all ranks, of which no element must be given twice."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Takes this rank's parts."""
        self._parts = parts

    def set_up_planner(
        self, state_dict: Mapping[str, Any], storage_meta: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up: the state dict is not used."""

    def create_local_plan(self) -> SavePlan:
        """Returns one write for each part; the index in its place says which."""
        items = []
        for number, part in enumerate(self._parts):
            name, global_shape, start, size, dtype = part.outline
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(size)),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size(global_shape),
            )
            index = MetadataIndex(fqn=name, offset=data.chunk.offsets, index=number)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Returns the plans as they are, with the description of all tensors.

        Raises:
            CheckpointError: The parts do not make up their tensors.
        """
        check_outlines([_outline(item) for plan in all_plans for item in plan.items])
        tensors: dict[str, Any] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = _data(item)
            if item.index.fqn not in tensors:
                tensors[item.index.fqn] = TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[])
            tensors[item.index.fqn].chunks.append(data.chunk)
        return all_plans, Metadata(state_dict_metadata=tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Returns the values of a write."""
        number = write_item.index.index
        if number is None:
            raise CheckpointError(f"{write_item.index.fqn}: must be a planned write, but is not. Plan it first.")
        return self._parts[number].values()


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn}: must be a tensor, but is not. Put other values into the JSON state.")
    return item.tensor_data


def _outline(item: WriteItem) -> Outline:
    data = _data(item)
    return Outline(
        name=item.index.fqn,
        global_shape=tuple(data.size),
        start=tuple(data.chunk.offsets),
        size=tuple(data.chunk.sizes),
        dtype=data.properties.dtype,
    )


class PieceLoadPlanner(LoadPlanner):
    """Plans the reading of whatever stored parts this rank's pieces need, whichever layout wrote them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Takes the pieces that are read into."""
        self._pieces = pieces
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: Mapping[str, Any], metadata: Metadata | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps the description of what is stored; the state dict is not used."""
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Returns one read for each pair of a piece and a stored part that have elements in common."""
        if self._metadata is None:
            raise CheckpointError("checkpoint: must be described to be read, but is not. Read its metadata first.")
        stored: dict[str, Any] = dict(self._metadata.state_dict_metadata)
        return LoadPlan(
            [
                read
                for number, piece in enumerate(self._pieces)
                for read in _reads(piece, number=number, chunks=stored[piece.name].chunks)
            ]
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are: each rank reads what it needs."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuses: there are only tensors."""
        raise CheckpointError(f"{read_item.dest_index.fqn}: must be a tensor, but is not. Ask for tensors only.")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the view that a read goes to."""
        number = read_item.dest_index.index
        if number is None:
            raise CheckpointError(f"{read_item.dest_index.fqn}: must be a planned read, but is not. Plan it first.")
        target = self._pieces[number].tensor.detach()
        pairs = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return target[tuple(slice(begin, begin + length) for begin, length in pairs)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the values are in place."""


def _reads(piece: Piece, *, number: int, chunks: Iterable[ChunkStorageMetadata]) -> Iterable[ReadItem]:
    size = piece.size
    for chunk in chunks:
        low = [max(a, b) for a, b in zip(piece.start, chunk.offsets, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(piece.start, size, chunk.offsets, chunk.sizes, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            yield ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(piece.name, torch.Size(piece.start), number),
                dest_offsets=torch.Size(a - o for a, o in zip(low, piece.start, strict=True)),
                storage_index=MetadataIndex(piece.name, chunk.offsets),
                storage_offsets=torch.Size(a - o for a, o in zip(low, chunk.offsets, strict=True)),
                lengths=torch.Size(b - a for a, b in zip(low, high, strict=True)),
            )
