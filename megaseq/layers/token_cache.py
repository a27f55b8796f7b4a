"""Keys and values of the tokens that a decoder has been fed: of all layers side by side, and of all hypotheses.

A search moves hypotheses about at every step: some are dropped, others go on twice. `MovingCache` moves what it holds
along; `LookupCache` leaves it where it is and keeps, for each hypothesis, the places of its tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megaseq.kernels.attention.lookup import attend_places
from megaseq.kernels.decode_attention import KeyValueCache, decode_attention, wanted_for
from megaseq.layers.attention import SelfAttention

INITIAL_CAPACITY = 32
"""Tokens that the first buffer has room for; it doubles when full."""


class TokenCache(Protocol):
    """What a step asks for: `begin`, then `attend` for each layer, `end`; between steps `select`."""

    @property
    def place(self) -> Tensor | int:
        """The number of the next token: [1] where the device counts."""
        ...

    def begin(self, rows: int) -> None:
        """Makes room for one more token of `rows` hypotheses."""
        ...

    def attend(
        self, block: SelfAttention, *, start: int, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """Stores the new token's key and value, and attends to all tokens that the block sees.

        Args:
            block: whose turn it is.
            start: where this layer's keys begin in the width of the cache.
            heads: query [R, 1, N, H], key and value [R, 1, M, H] of the new token.
            bias: added to the scores, [1, N, 1, at least tokens], that of the newest token last; None is none.

        Returns:
            [R, N*H].
        """
        ...

    def end(self) -> None:
        """Counts the token that all layers have stored."""
        ...

    def select(self, rows: Tensor, *, before: int) -> None:
        """Goes on with hypotheses `rows` [R'] of the `before` that there were."""
        ...


class MovingCache:
    """A flat buffer [length, R, width] of tokens: time comes first, so that a step appends in place and one gather
    moves all layers; and a spare one to gather into, with which it changes places."""

    def __init__(self, *, width: int, like: Tensor) -> None:
        self.place = 0
        self._width = width
        self._buffer = like.new_empty(0)
        self._spare: Tensor | None = None
        self._rows = 0

    def begin(self, rows: int) -> None:
        """See `TokenCache`."""
        self._rows = rows
        size = self.place * rows * self._width
        if self._buffer.numel() < size + rows * self._width:
            larger = self._buffer.new_empty(max(INITIAL_CAPACITY, 2 * self.place) * rows * self._width)
            larger[:size] = self._buffer[:size]
            self._buffer, self._spare = larger, None

    def attend(
        self, block: SelfAttention, *, start: int, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """See `TokenCache`."""
        query, key, value = heads
        length, rows = self.place + 1, self._rows
        kept = self._buffer[: length * rows * self._width].view(length, rows, self._width)
        kept = kept[:, :, start : start + 2 * block.key_dim]
        entry = kept[-1].view(rows, 2, block.num_key_value_heads, block.head_dim)
        entry[:, 0].copy_(key[:, 0])
        entry[:, 1].copy_(value[:, 0])
        first = 0 if block.params.window is None else max(0, length - block.params.window)
        past = kept[first:].view(length - first, rows, 2, block.num_key_value_heads, block.head_dim)
        keys, values = past.permute(2, 1, 0, 3, 4).unbind(0)
        if bias is not None:
            bias = bias[..., bias.shape[-1] - (length - first) :]
        return block.attend(query, key=keys, value=values, mask=None, bias=bias).view(rows, -1)

    def end(self) -> None:
        """See `TokenCache`."""
        self.place += 1

    def select(self, rows: Tensor, *, before: int) -> None:
        """See `TokenCache`."""
        length, count = self.place, rows.numel()
        if length == 0:
            return
        needed = length * count * self._width
        if self._spare is None or self._spare.numel() < needed:
            room = max(INITIAL_CAPACITY, 2 * length) * count * self._width
            self._spare = self._buffer.new_empty(max(self._buffer.numel(), room))
        source = self._buffer[: length * before * self._width].view(length, before, self._width)
        torch.index_select(source, 1, rows, out=self._spare[:needed].view(length, count, self._width))
        self._buffer, self._spare = self._spare, self._buffer


class LookupCache:
    """A buffer [tokens, width], appended to and never moved, and a table [R, capacity] of each hypothesis' tokens.

    Nothing is read back from a device.
    """

    def __init__(self, *, width: int, like: Tensor) -> None:
        self.place = 0
        self._by_op = wanted_for(like)
        self._lengths = torch.empty(0, dtype=torch.long, device=like.device)
        self._buffer = like.new_empty(0, width)
        self._used = 0
        self._rows = 0
        self._places = torch.empty(0, INITIAL_CAPACITY, dtype=torch.long, device=like.device)

    def begin(self, rows: int) -> None:
        """See `TokenCache`."""
        if self._rows != rows:
            if self.place:
                raise RuntimeError(f"cache: must be told by select of {rows} hypotheses, but holds {self._rows}.")
            self._rows = rows
            self._places = self._places.new_empty(rows, INITIAL_CAPACITY)
        if self._places.shape[1] == self.place:
            self._places = torch.cat([self._places, torch.empty_like(self._places)], dim=1)
        if self._buffer.shape[0] < self._used + rows:
            larger = self._buffer.new_empty(max(INITIAL_CAPACITY * rows, 2 * self._used + rows), self._buffer.shape[1])
            larger[: self._used] = self._buffer[: self._used]
            self._buffer = larger
        self._places[:, self.place] = torch.arange(self._used, self._used + rows, device=self._places.device)
        if self._by_op:
            self._lengths = torch.full((rows,), self.place + 1, device=self._places.device)

    def attend(
        self, block: SelfAttention, *, start: int, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """See `TokenCache`."""
        query, key, value = heads
        length, rows = self.place + 1, self._rows
        shape = (-1, 2, block.num_key_value_heads, block.head_dim)
        kept = self._buffer[: self._used + rows, start : start + 2 * block.key_dim].view(shape)
        torch.stack([key[:, 0], value[:, 0]], dim=1, out=kept[self._used :])
        if self._by_op:
            keys, values = kept.unsqueeze(1).unbind(2)
            return decode_attention(
                query,
                cache=KeyValueCache(keys, values, self._places.unsqueeze(1)),
                lengths=self._lengths,
                bias=None if bias is None else bias[0, :, 0],
                scale=block.scale,
                soft_cap=block.params.soft_cap,
                window=block.params.window,
            ).view(rows, -1)
        first = 0 if block.params.window is None else max(0, length - block.params.window)
        if bias is not None:
            bias = bias[0, :, 0, bias.shape[-1] - (length - first) :]
        keys, values = kept.unbind(1)
        places = self._places if first == 0 else self._places[:, first:length].contiguous()
        heads_out = attend_places(
            query[:, 0], key=keys, value=values, places=places, length=length - first, scale=block.scale, bias=bias
        )
        return heads_out.view(rows, -1)

    def end(self) -> None:
        """See `TokenCache`."""
        self.place += 1
        self._used += self._rows

    def select(self, rows: Tensor, *, before: int) -> None:
        """See `TokenCache`."""
        if self.place:
            self._places = self._places.index_select(0, rows)
            self._rows = rows.numel()
