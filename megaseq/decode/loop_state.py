"""What a beam search on a device goes on with from step to step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from megaseq.decode.finished import Finished
from megaseq.decode.protocol import State
from megaseq.decode.search import Start


@dataclass
class LoopState:
    """The hypotheses of B sources, K each, or 1 before the first step.

    Attributes:
        rows: [B] index of each source in the batch that the search began with.
        places: [B], 0 to B - 1: the sources' rows in `finished`.
        active: bool [B], sources that are not done.
        total: [B, K] log-probability so far; -inf where there is no hypothesis.
        ids: [B, K, T] tokens so far, with room for all.
        most: [B] steps that a source may take.
        least: [B] tokens before the end token.
        step: [1], how many steps there have been.
        nan_step: [1], the first in which an active source's logits were NaN, or -1.
        finished: What has ended, of these sources.
        lengths: [B] source lengths, with a coverage penalty only.
        attention: [B, K, S] attention summed over the steps, with a coverage penalty only.
    """

    rows: torch.Tensor
    places: torch.Tensor
    active: torch.Tensor
    total: torch.Tensor
    ids: torch.Tensor
    most: torch.Tensor
    least: torch.Tensor
    step: torch.Tensor
    nan_step: torch.Tensor
    finished: Finished
    lengths: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    @classmethod
    def begin(cls, start: Start, *, size: int, num_steps: int, covered: bool) -> LoopState:
        """One empty hypothesis for each source, with room for `size` finished ones of `num_steps` tokens."""
        count, device = start.tokens.shape[0], start.tokens.device
        rows = torch.arange(count, device=device)
        return cls(
            rows=rows,
            places=rows,
            active=torch.ones(count, dtype=torch.bool, device=device),
            total=torch.zeros(count, 1, device=device),
            ids=torch.zeros(count, 1, num_steps, dtype=torch.long, device=device),
            most=start.limits.most,
            least=start.limits.least,
            step=torch.zeros(1, dtype=torch.long, device=device),
            nan_step=torch.full((1,), -1, device=device),
            finished=Finished(count, size=size, steps=num_steps, device=device),
            lengths=start.lengths if covered else None,
        )

    def add_attention(self, attention: torch.Tensor) -> None:
        """Adds one step's attention, [B * K, S]."""
        new = attention.float().view(*self.total.shape, -1)
        self.attention = new if self.attention is None else self.attention + new

    def copy_(self, other: LoopState) -> None:
        """Takes over the values of `other` in the memory that these tensors have; both share `finished`."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, torch.Tensor) and mine is not value:
                mine.copy_(value)

    def take(self, kept: torch.Tensor) -> LoopState:
        """The state of some sources, `kept` [B']."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and name not in ("step", "nan_step", "places"):
                setattr(new, name, value[kept])
        new.places, new.finished = self.places[: kept.shape[0]], self.finished.take(kept)
        return new


@dataclass
class Running:
    """What a search goes on with after each step: its hypotheses, the decoder's state, the last tokens [B * K]."""

    loop: LoopState
    state: State
    tokens: torch.Tensor
