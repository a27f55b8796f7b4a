"""The finished hypotheses of every source, kept as tensors: an n-best list that is always sorted."""

from __future__ import annotations

import copy

import torch

from megaseq.decode.hypothesis import Hypothesis
from megaseq.kernels.beam_step.topk import NEG_INF


class Finished:
    """The N best finished hypotheses of B sources.

    Attributes:
        score: [B, N] ranking scores, best first; -inf where there is none yet.
        count: [B] hypotheses that ever finished, also those that fell off the list.
        best_logprob: [B] highest log-probability of a finished hypothesis; -inf while there is none.
    """

    def __init__(self, num_sources: int, *, size: int, steps: int, device: torch.device) -> None:
        self.score = torch.full((num_sources, size), NEG_INF, device=device)
        self.count = torch.zeros(num_sources, dtype=torch.long, device=device)
        self.best_logprob = torch.full((num_sources,), NEG_INF, device=device)
        self._logprob = torch.full((num_sources, size), NEG_INF, device=device)
        self._length = torch.zeros((num_sources, size), dtype=torch.long, device=device)
        self._ended = torch.zeros((num_sources, size), dtype=torch.bool, device=device)
        self._ids = torch.zeros((num_sources, size, steps), dtype=torch.long, device=device)

    def add(
        self,
        rows: torch.Tensor,
        *,
        score: torch.Tensor,
        logprob: torch.Tensor,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        ended: torch.Tensor,
    ) -> None:
        """Adds the hypotheses that finished in one step; among equals, those that came first stay ahead.

        Args:
            rows: [B'] the sources they belong to, each at most once.
            score: [B', E] their ranking scores; -inf where there is no hypothesis.
            logprob: [B', E].
            ids: [B', E, L] their tokens, and whatever behind them.
            lengths: [B', E], how many tokens, without an end-of-sequence token.
            ended: [B', E], whether such a token closed them.
        """
        size, num_ids = self.score.shape[1], ids.shape[-1]
        present = score > NEG_INF
        logprob = logprob.masked_fill(~present, NEG_INF)
        self.count[rows] += present.sum(dim=1)
        self.best_logprob[rows] = torch.maximum(self.best_logprob[rows], logprob.amax(dim=1))

        scores, order = torch.cat([self.score[rows], score], dim=1).sort(dim=1, descending=True, stable=True)
        order = order[:, :size]
        self.score[rows] = scores[:, :size]
        for kept, new in (
            (self._logprob, logprob),
            (self._length, lengths),
            (self._ended, ended),
        ):
            kept[rows] = torch.cat([kept[rows], new], dim=1).gather(1, order)
        merged = torch.cat([self._ids[rows][..., :num_ids], ids], dim=1)
        longer = order.unsqueeze(-1).expand(-1, -1, num_ids)
        self._ids[rows, :, :num_ids] = merged.gather(1, longer)

    def take(self, rows: torch.Tensor) -> Finished:
        """A copy with the sources `rows` [B'] alone."""
        taken = copy.copy(self)
        for name, tensor in vars(self).items():
            setattr(taken, name, tensor[rows])
        return taken

    def put(self, rows: torch.Tensor, other: Finished) -> None:
        """Replaces what there is of the sources `rows` [B'] by `other`, of B' sources."""
        for name, tensor in vars(self).items():
            tensor[rows] = getattr(other, name)

    def hypotheses(self, *, num_best: int) -> list[list[Hypothesis]]:
        """The best `num_best` of each source, best first; fewer where fewer finished."""
        scores, logprobs = self.score.tolist(), self._logprob.tolist()
        lengths, ended, ids = self._length.tolist(), self._ended.tolist(), self._ids.tolist()
        return [
            [
                Hypothesis(tuple(ids[b][n][: lengths[b][n]]), scores[b][n], logprobs[b][n], ended[b][n])
                for n in range(min(num_best, len(scores[b])))
                if scores[b][n] > NEG_INF
            ]
            for b in range(len(scores))
        ]
