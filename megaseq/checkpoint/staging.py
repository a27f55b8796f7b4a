"""Copies of the tensors in host memory, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Stager:
    """Copies tensors into buffers that are kept from one save to the next; page-locked for those on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies of `tensors` on the CPU; they are valid until the next call."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        on_gpu = False
        for name, tensor in tensors.items():
            on_gpu |= tensor.is_cuda
            self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if on_gpu:
            torch.cuda.synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
