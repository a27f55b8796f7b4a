"""The cache of a decoder's own tokens whose every step is the same ops on the same memory, as a CUDA graph wants it."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.decode_attention import KeyValueCache, decode_attention
from megaseq.layers.attention import SelfAttention


class FixedCache:
    """A `TokenCache` with room for a given number of tokens, which the device counts and not the host.

    The buffer is [capacity, R, width]: the keys and values of each step stand next to each other and are never moved; a
    table [R, capacity] has the places of each hypothesis' tokens.
    """

    def __init__(self, *, width: int, rows: int, capacity: int, like: Tensor) -> None:
        """Makes an empty cache of `rows` R hypotheses at most, in the dtype and on the device of `like`."""
        device = like.device
        self.place: Tensor = torch.zeros(1, dtype=torch.long, device=device)
        """[1], the number of the next token."""
        self._buffer = like.new_empty(capacity, rows, width)
        self._table = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self._numbers = torch.arange(rows, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._rows = 0

    @property
    def capacity(self) -> int:
        """Tokens of each hypothesis that there is room for; a step beyond it is not noticed."""
        return self._buffer.shape[0]

    def grow(self, capacity: int) -> None:
        """Moves to larger memory with room for `capacity` tokens."""
        before = self.capacity
        buffer = self._buffer.new_empty(capacity, *self._buffer.shape[1:])
        buffer[:before] = self._buffer
        table = self._table.new_zeros(self._table.shape[0], capacity)
        table[:, :before] = self._table
        self._buffer, self._table = buffer, table

    def begin(self, rows: int) -> None:
        """See `TokenCache`."""
        self._rows = rows
        places = self.place * self._buffer.shape[1] + self._numbers[:rows]
        self._table[:rows].index_copy_(1, self.place, places.unsqueeze(1))
        self._lengths[:rows] = self.place + 1

    def attend(
        self, block: SelfAttention, *, start: int, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """See `TokenCache`; of `bias` all columns are taken for distances, the newest token's last."""
        query, key, value = heads
        rows = self._rows
        kept = self._buffer[:, :, start : start + 2 * block.key_dim]
        entry = torch.stack([key[:, 0], value[:, 0]], dim=1).view(1, rows, 2 * block.key_dim)
        kept[:, :rows].index_copy_(0, self.place, entry)
        flat = kept.view(-1, 1, 2, block.num_key_value_heads, block.head_dim)
        return decode_attention(
            query,
            cache=KeyValueCache(flat[:, :, 0], flat[:, :, 1], self._table[:rows].unsqueeze(1)),
            lengths=self._lengths[:rows],
            bias=None if bias is None else bias[0, :, 0],
            scale=block.scale,
            soft_cap=block.params.soft_cap,
            window=block.params.window,
        ).view(rows, -1)

    def end(self) -> None:
        """See `TokenCache`."""
        self.place += 1

    def select(self, rows: Tensor, *, before: int) -> None:
        """See `TokenCache`; in place where there are as many as there is room for."""
        chosen = self._table[:before].index_select(0, rows)
        if chosen.shape == self._table.shape:
            self._table.copy_(chosen)
        else:
            self._table = chosen
        self._rows = chosen.shape[0]
