"""Top-k with ties that always fall the same way, on any device."""

from __future__ import annotations

import torch

NEG_INF = float("-inf")

BLOCK = 64
"""Columns whose maximum is looked at first."""


def ordered_keys(scores: torch.Tensor, *, ranks: torch.Tensor) -> torch.Tensor:
    """One int64 key for each (score, rank): keys order by higher score, then by lower rank.

    Args:
        scores: fp32, any shape, no NaN.
        ranks: int64 of the same shape, each in [0, 2**32).
    """
    # The bits of a float order like integers once those of negative numbers are flipped; + 0.0 folds -0.0 into 0.0.
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) + (0xFFFFFFFF - ranks)


def merged_topk(scores: torch.Tensor, *, ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [B, k] of the best of `scores` [B, C], best first, ties to the lower of `ranks` [B, C]; needs k <= C."""
    return ordered_keys(scores, ranks=ranks).topk(k, dim=-1).indices


def row_topk(scores: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row of `scores` [N, V]: (values [N, k], ids [N, k]), best first; ties to the lower id."""
    vocab = scores.shape[-1]
    if k >= vocab or scores.is_cuda:
        ranks = torch.arange(vocab, device=scores.device).expand_as(scores)
        ids = merged_topk(scores.float(), ranks=ranks, k=min(k, vocab))
        return scores.gather(-1, ids), ids
    # torch.topk leaves open which of several equal values it takes. That matters only when the first value left out
    # equals the last one taken, so ask for one more and look; reading the answer back is free on a CPU.
    values, ids = _blockwise_topk(scores, k=k + 1)
    if bool(((values[:, k - 1] == values[:, k]) & (values[:, k] > NEG_INF)).any()):
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _blockwise_topk(scores: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, with any choice among ties at the border, but with a tie there whenever there is one.

    The best of a row lie in the k blocks with the highest maxima: finding those is one vectorised pass, about twice as
    fast as torch.topk over a whole row. A block that was left out holds nothing above the k-th best value.
    """
    vocab = scores.shape[-1]
    blocks = vocab // BLOCK
    if blocks < 4 * k:
        return scores.topk(k, dim=-1)
    whole = scores[:, : blocks * BLOCK].view(-1, blocks, BLOCK)
    best = whole.amax(dim=-1).topk(k, dim=-1).indices
    values = whole.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    values = torch.cat([values, scores[:, blocks * BLOCK :]], dim=1)
    values, places = values.topk(k, dim=-1)
    starts = best.gather(1, (places // BLOCK).clamp(max=k - 1)) * BLOCK + places % BLOCK
    return values, torch.where(places < k * BLOCK, starts, places + (blocks - k) * BLOCK)
