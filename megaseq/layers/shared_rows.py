"""Attention where ranks share the tokens of rows: what a layer needs in place of a mask over its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.attention import AttentionMask, RelativeBias, attention, computes_bias
from megaseq.kernels.attention.ranges import SegmentRanges
from megaseq.kernels.attention.ring import RingDropout, RingSettings, ring_attention
from megaseq.kernels.dropout import DropoutKey, DropoutMask
from megaseq.layers.relative import PositionBias
from megaseq.layers.tokens import Tokens
from megaseq.parallel.spec import ContextRanks


class SharedRow:
    """One side of a batch whose rows `megaseq.parallel.context.shard_batch` has cut."""

    def __init__(self, ranks: ContextRanks, *, segment_ids: Tensor, row_start: int, row_stride: int) -> None:
        """Describes the rows.

        Args:
            ranks: which share them.
            segment_ids: [B, length] of the whole rows, 0 is padding.
            row_start: as of `Tokens`.
            row_stride: as of `Tokens`.
        """
        self.ranks = ranks
        length = segment_ids.shape[1]
        self.padded = ranks.padded(length)
        self.segment_ids = functional.pad(segment_ids, (0, self.padded - length))
        self.tokens = Tokens(
            length=length,
            row_start=row_start,
            row_stride=row_stride,
            places=ranks.places(length, device=segment_ids.device),
        )

    def bias(self, layer: PositionBias) -> Tensor | RelativeBias:
        """Returns the biases [N, 2 * padded - 1] of all distances of two places of a row, the smallest first; or by
        distance, where attention wants them so."""
        device = self.segment_ids.device
        if self.ranks.method == "ulysses" and computes_bias(device):
            return layer.relative(device=device)
        places = torch.arange(1 - self.padded, self.padded, device=device)
        return layer.by_distance(places)

    def mask(self, *, causal: bool, window: int | None) -> SharedMask:
        """Returns who sees whom in self-attention."""
        return SharedMask(self, self, causal=causal, window=window)

    def mask_of(self, segment_ids: Tensor) -> SharedMask:
        """Returns who sees whom of rows with `segment_ids` [B, S], the sources of these, which the ranks share too."""
        tokens = self.tokens
        other = SharedRow(self.ranks, segment_ids=segment_ids, row_start=tokens.row_start, row_stride=tokens.row_stride)
        return SharedMask(self, other, causal=False, window=None)


class SharedMask:
    """Who sees whom, in whole rows, and how this rank's queries get at the keys of all ranks."""

    def __init__(self, queries: SharedRow, keys: SharedRow, *, causal: bool, window: int | None) -> None:
        self.queries, self.keys = queries, keys
        self.causal, self.window = causal, window
        self._ranges: dict[tuple[int, int], SegmentRanges] = {}
        self._whole = AttentionMask(
            query_segment_ids=queries.segment_ids, key_segment_ids=keys.segment_ids, causal=causal, window=window
        )

    def attend(
        self,
        query: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        bias: Tensor | RelativeBias | None,
        scale: float,
        soft_cap: float | None,
        heads: tuple[int, int],
        dropout: tuple[float, DropoutKey] | None,
    ) -> Tensor:
        """Attends with this rank's queries; all ranks call it at the same time.

        Args:
            query: [B, t, N, H].
            key: [B, s, M, H], of this rank's tokens.
            value: [B, s, M, H].
            bias: what `SharedRow.bias` returned; None: none.
            scale: factor of the scores.
            soft_cap: as of `kernels.attention`.
            heads: (number of the first head here, heads of the model).
            dropout: (rate, key) of the weights; None outside training.

        Returns:
            [B, t, N, H].
        """
        if self.queries.ranks.method == "ulysses" or isinstance(bias, RelativeBias):
            return self._by_heads(
                query, key=key, value=value, bias=bias, scale=scale, soft_cap=soft_cap, heads=heads, dropout=dropout
            )
        chosen: RingDropout | None = None
        if dropout is not None:
            chosen = RingDropout(dropout[0], dropout[1], self._rows(query), heads, self._lengths())
        settings = RingSettings(
            ring=self.queries.ranks,
            query_segment_ids=self.queries.segment_ids,
            key_segment_ids=self.keys.segment_ids,
            causal=self.causal,
            window=self.window,
            scale=scale,
            soft_cap=soft_cap,
            dropout=chosen,
            ranges=self._ranges,
        )
        return ring_attention(query, key=key, value=value, bias=bias, settings=settings)

    def _by_heads(
        self,
        query: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        bias: Tensor | RelativeBias | None,
        scale: float,
        soft_cap: float | None,
        heads: tuple[int, int],
        dropout: tuple[float, DropoutKey] | None,
    ) -> Tensor:
        """Exchanges tokens for heads, attends in whole rows, and exchanges back."""
        ranks = self.queries.ranks
        count = query.shape[2] // ranks.size
        first = ranks.index * count
        query, key, value = (ranks.tokens_for_heads(tensor) for tensor in (query, key, value))
        whole_bias: Tensor | RelativeBias | None = None
        if isinstance(bias, RelativeBias):
            whole_bias = bias.of_heads(first, first + count)
        elif bias is not None:
            own = bias[first : first + count]
            whole_bias = own.unfold(1, self.keys.padded, 1).flip(1).unsqueeze(0)
        mask: DropoutMask | None = None
        if dropout is not None:
            numbers = torch.arange(heads[0] + first, heads[0] + first + count, device=query.device)
            queries, keys = self._lengths()
            places = torch.arange(query.shape[1], device=query.device)
            runs = (self._rows(query)[:, None, None] * heads[1] + numbers[:, None]) * queries + places
            mask = DropoutMask(dropout[0], dropout[1], (runs * keys).flatten())
        attended = attention(
            query,
            key=key,
            value=value,
            mask=self._whole,
            bias=whole_bias,
            scale=scale,
            soft_cap=soft_cap,
            dropout=mask,
        )
        return ranks.heads_for_tokens(attended)

    def _rows(self, query: Tensor) -> Tensor:
        return self.queries.tokens.rows(query.shape[0], device=query.device)

    def _lengths(self) -> tuple[int, int]:
        return self.queries.tokens.length, self.keys.tokens.length
