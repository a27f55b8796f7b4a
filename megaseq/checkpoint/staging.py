"""Copies of the tensors beside them, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from megaseq.checkpoint.piece import Piece


class Room(Protocol):
    """Where copies lie instead of host memory, because the tensors themselves do too."""

    def like(self, tensor: Tensor) -> Tensor:
        """Returns room for a copy of `tensor`, which is on the CPU."""

    def release(self, tensors: Sequence[Tensor]) -> None:
        """Gives back the memory that the contents of `tensors` take up for now."""


class Stager:
    """Copies pieces into buffers that are kept from one save to the next; page-locked for those on a GPU."""

    def __init__(self, room: Room | None = None) -> None:
        """Takes where copies lie; None is host memory."""
        self._room = room
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def stage(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Returns copies of `pieces` on the CPU; they are valid until the next call."""
        self._buffers = {(piece.name, piece.start): self._buffer(piece) for piece in pieces}
        on_gpu = False
        copies: list[Piece] = []
        for piece in pieces:
            buffer = self._buffers[piece.name, piece.start]
            on_gpu |= piece.tensor.is_cuda
            buffer.copy_(piece.tensor, non_blocking=piece.tensor.is_cuda)
            if self._room is not None:
                self._room.release([piece.tensor, buffer])
            copies.append(replace(piece, tensor=buffer))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, piece: Piece) -> Tensor:
        tensor = piece.tensor
        buffer = self._buffers.get((piece.name, piece.start))
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            return buffer
        if self._room is not None and not tensor.is_cuda:
            return self._room.like(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
