"""Which part of a global activation a tensor holds, so that dropout has the masks of one process on any layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.dropout import Start


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which rows and tokens of the step's batch a tensor [B, t, ...] holds."""

    length: int
    """Tokens T of a whole row."""
    row_start: int = 0
    """Number of the first row in the step's global batch."""
    row_stride: int = 1
    """From one row to the next, in these numbers."""
    start: int = 0
    """The first token, where the tensor holds neighbouring ones."""
    places: Tensor | None = None
    """int64 [t], the tokens, where they are not neighbours."""
    divided: bool = False
    """Whether tensor ranks share the tokens, a run of them each (`parallel.sequence`)."""

    def part(self, *, start: int, length: int) -> Tokens:
        """Returns the `length` tokens from the `start`-th on that are held here, as a tensor rank's share."""
        places = None if self.places is None else self.places[start : start + length]
        return Tokens(
            length=self.length,
            row_start=self.row_start,
            row_stride=self.row_stride,
            start=self.start + start,
            places=places,
            divided=True,
        )

    def rows(self, count: int, *, device: torch.device) -> Tensor:
        """Returns the global numbers of `count` rows, int64 [count]."""
        return self.row_start + self.row_stride * torch.arange(count, device=device)


def starts(x: Tensor, *, tokens: Tokens, columns: tuple[int, int] | None = None) -> Start:
    """Returns where `x` [B, t, d] stands in the global activation [rows, T, D], row-major.

    Args:
        x: the tensor.
        tokens: its rows and tokens.
        columns: (first, D) where `x` has a run of columns; None: all.
    """
    batch, count, width = x.shape
    first, total = columns or (0, width)
    whole_rows = total == width and tokens.places is None
    if whole_rows and count == tokens.length and (tokens.row_stride == 1 or batch <= 1):
        return tokens.row_start * tokens.length * total
    rows = tokens.rows(batch, device=x.device)
    if whole_rows:
        return (rows * tokens.length + tokens.start) * total
    places = tokens.places
    if places is None:
        places = torch.arange(tokens.start, tokens.start + count, device=x.device)
    return ((rows[:, None] * tokens.length + places) * total + first).view(-1)


def token_numbers(tokens: Tokens, *, batch: int, count: int, device: torch.device) -> Tensor:
    """Returns the numbers [batch, count] of the tokens of [batch, count, ...] among all rows * T, row-major."""
    places = tokens.places
    if places is None:
        places = torch.arange(tokens.start, tokens.start + count, device=device)
    return tokens.rows(batch, device=device)[:, None] * tokens.length + places


def starts_of_weights(
    *, tokens: Tokens, batch: int, heads: tuple[int, int, int], lengths: tuple[int, int], device: torch.device
) -> Start:
    """Returns where attention weights [B, n, T, S] of whole rows stand among [rows, N, T, S], row-major.

    Args:
        tokens: the rows.
        batch: B.
        heads: (first, n, N), a run of heads.
        lengths: (T, S).
        device: of the weights.
    """
    first, count, total = heads
    area = lengths[0] * lengths[1]
    if count == total and (tokens.row_stride == 1 or batch <= 1):
        return tokens.row_start * total * area
    return (tokens.rows(batch, device=device) * total + first) * area
