"""A table of biases by distance in the form that kernels read, and the way back of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.functions import apply_one

LOG2_E = 1.4426950408889634
"""Kernels compute scores of base 2."""
TABLE_PAD = 256
"""Columns that repeat each end of a table, so that no distance of a tile that touches it is outside."""


def readable_table(table: Tensor) -> Tensor:
    """`table` [N, W] for the kernels: float32 [N, W + 2 TABLE_PAD], of base 2, each end repeated."""
    return apply_one(_Readable, table)


class _Readable(torch.autograd.Function):
    """Saves nothing for the backward pass, so a checkpointed layer may be the one that makes it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.dtype = table.dtype
        scaled = table.float() * LOG2_E
        first, last = (end.expand(-1, TABLE_PAD) for end in (scaled[:, :1], scaled[:, -1:]))
        return torch.cat([first, scaled, last], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return folded(gradients[0]).to(ctx.dtype)


def folded(gradient: Tensor) -> Tensor:
    """The gradient [N, W] of a table, of that of its readable form [N, W + 2 TABLE_PAD]: float32."""
    scaled = gradient * LOG2_E
    inner = scaled[:, TABLE_PAD:-TABLE_PAD]
    inner[:, 0] += scaled[:, :TABLE_PAD].sum(dim=1)
    inner[:, -1] += scaled[:, -TABLE_PAD:].sum(dim=1)
    return inner
