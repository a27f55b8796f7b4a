"""A fake model: the next token's scores come from a table, so that every search can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megaseq.base import NestedMap

SOS, EOS = 0, 1


@dataclass
class TableState:
    """`source` [B] index of each source, `history` [B, K, t] all tokens fed so far."""

    source: torch.Tensor
    history: torch.Tensor
    attention_probs: torch.Tensor | None = None


class TableDecoder:
    """Scores of the next token = table(source index, tokens fed without the start token)."""

    def __init__(
        self,
        table: Callable[[int, tuple[int, ...]], Sequence[float]],
        attention: Callable[[int, tuple[int, ...]], Sequence[float]] | None = None,
    ) -> None:
        self.table = table
        self.attention = attention
        self.rows_per_step: list[int] = []
        self.selects = 0

    def prefill(self, source: NestedMap) -> TableState:
        """One hypothesis a source."""
        index = source["ids"][:, 0]
        return TableState(index, torch.zeros(index.shape[0], 1, 0, dtype=torch.long))

    def step(
        self, state: TableState, *, tokens: torch.Tensor, need_attention: bool = False
    ) -> tuple[torch.Tensor, TableState]:
        """Looks every hypothesis up."""
        batch, num_hyps, _ = state.history.shape
        assert tokens.shape == (batch * num_hyps,)
        self.rows_per_step.append(batch * num_hyps)
        history = torch.cat([state.history, tokens.view(batch, num_hyps, 1)], dim=-1)
        rows, attention = [], []
        for b in range(batch):
            for k in range(num_hyps):
                fed = tuple(history[b, k, 1:].tolist())
                rows.append(list(self.table(int(state.source[b]), fed)))
                if self.attention is not None and need_attention:
                    attention.append(list(self.attention(int(state.source[b]), fed)))
        new = TableState(state.source, history, torch.tensor(attention) if attention else None)
        return torch.tensor(rows, dtype=torch.float32), new

    def select(self, state: TableState, *, sources: torch.Tensor, hyps: torch.Tensor) -> TableState:
        """Reorders the histories."""
        self.selects += 1
        history = state.history[sources]
        history = history.gather(1, hyps.unsqueeze(-1).expand(-1, -1, history.shape[-1]))
        return TableState(state.source[sources], history)


def sources(count: int, *, length: int = 4, first: int = 0) -> NestedMap:
    """`count` sources of the same length whose first id is their index."""
    ids = torch.ones(count, length, dtype=torch.long)
    ids[:, 0] = torch.arange(first, first + count)
    return NestedMap(ids=ids, segment_ids=torch.ones_like(ids), positions=torch.arange(length).expand(count, length))
