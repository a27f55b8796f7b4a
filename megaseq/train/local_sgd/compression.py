"""How changes of parameters are written for the way."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.train.local_sgd.params import Compression

BLOCK = 1024
"""Elements that share a scale in int8."""


def encode(values: Tensor, *, compression: Compression) -> bytes:
    """Returns `values` [N], float32, as bytes: 4, 2 or little more than 1 for each."""
    if compression == "none":
        return values.numpy().tobytes()
    if compression == "bfloat16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1) / 127.0
    whole = (padded / scales.clamp_min(1e-38)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return scales.numpy().tobytes() + whole.view(-1)[: len(values)].numpy().tobytes()


def encoded_size(count: int, *, compression: Compression) -> int:
    """Returns the bytes that `encode` makes of `count` values."""
    if compression == "int8":
        return count + 4 * -(-count // BLOCK)
    return count * (4 if compression == "none" else 2)


def decode(data: bytes | bytearray, *, count: int, compression: Compression) -> Tensor:
    """Returns the `count` values [N], float32, that `encode` was given, but for rounding.

    Raises:
        ValueError: `data` is of another size.
    """
    if len(data) != encoded_size(count, compression=compression):
        raise ValueError(f"{len(data)} bytes do not hold {count} values")
    if count == 0:
        return torch.zeros(0)
    if compression == "none":
        return torch.frombuffer(bytearray(data), dtype=torch.float32)
    if compression == "bfloat16":
        return torch.frombuffer(bytearray(data), dtype=torch.int16).view(torch.bfloat16).float()
    blocks = -(-count // BLOCK)
    buffer = bytearray(data)
    scales = torch.frombuffer(buffer, dtype=torch.float32, count=blocks)
    whole = torch.frombuffer(buffer, dtype=torch.int8, offset=4 * blocks)
    return whole.float() * scales.repeat_interleave(BLOCK)[:count]
