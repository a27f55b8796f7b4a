"""The calls of attention that tests prove and benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megaseq.kernels.attention.mask import AttentionMask


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and kind of one call."""

    name: str
    batch: int = 2
    query_length: int = 7
    key_length: int = 7
    num_heads: int = 4
    num_key_heads: int = 4
    head_dim: int = 16
    causal: bool = False
    window: int | None = None
    packed: bool = False
    """Several segments and padding in each row; otherwise one segment and padding."""
    biased: bool = False

    def tensors(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, T, N, H], key and value [B, S, M, H], wanting gradients; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(self.query_length, self.num_heads)] + [(self.key_length, self.num_key_heads)] * 2
        query, key, value = (
            torch.randn(self.batch, length, heads, self.head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for length, heads in shapes
        )
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()

    def bias(self, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor | None:
        """A bias [1, N, T, S] that wants a gradient, or None."""
        if not self.biased:
            return None
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.num_heads, self.query_length, self.key_length)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def mask(self) -> AttentionMask:
        """The mask of the call, freshly made."""
        query_ids = self._segment_ids(self.query_length)
        key_ids = query_ids if self.query_length == self.key_length else self._segment_ids(self.key_length)
        return AttentionMask(
            query_segment_ids=query_ids, key_segment_ids=key_ids, causal=self.causal, window=self.window
        )

    def _segment_ids(self, length: int) -> Tensor:
        """[B, length]: cut at places that differ from row to row, with padding at the end."""
        ids = torch.zeros(self.batch, length, dtype=torch.int64)
        for row in range(self.batch):
            real = length - row % 3
            pieces = (2 + row % 3) if self.packed else 1
            bounds = [real * piece // pieces for piece in range(pieces + 1)]
            for number, (start, stop) in enumerate(pairwise(bounds), start=1):
                ids[row, start:stop] = number
        return ids


CASES = (
    AttentionCase("plain"),
    AttentionCase("causal", causal=True),
    AttentionCase("cross", query_length=5, key_length=11),
    AttentionCase("packed", batch=5, query_length=24, key_length=24, packed=True),
    AttentionCase("packed_causal", batch=5, query_length=24, key_length=24, packed=True, causal=True),
    AttentionCase("packed_cross", batch=4, query_length=17, key_length=29, packed=True),
    AttentionCase("grouped", num_key_heads=2, packed=True, query_length=12, key_length=12, causal=True),
    AttentionCase("single_key_head", num_key_heads=1),
    AttentionCase("window", query_length=16, key_length=16, causal=True, window=4),
    AttentionCase("window_both_sides", query_length=16, key_length=16, window=3, packed=True),
    AttentionCase("biased", biased=True),
    AttentionCase("biased_packed_causal", biased=True, packed=True, causal=True, query_length=20, key_length=20),
    AttentionCase("one_token", batch=1, query_length=1, key_length=1),
    AttentionCase("decode_step", batch=3, query_length=1, key_length=9),
    AttentionCase("wide_head", head_dim=96, num_heads=2, num_key_heads=2, packed=True),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Largest difference from the reference that a correct implementation shows at unit scale."""
