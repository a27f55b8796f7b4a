"""The constraints on the next token that come with megaseq."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megaseq.base import REQUIRED
from megaseq.decode.constraints import LogitsProcessor, View
from megaseq.kernels.beam_step.topk import NEG_INF


def _only(scores: torch.Tensor, *, token: int) -> torch.Tensor:
    """Scores that leave one token, at no cost."""
    forced = torch.full_like(scores, NEG_INF)
    forced[..., token] = 0.0
    return forced


class ForcedBos(LogitsProcessor):
    """The first token is given: a target-language tag, as in M2M100 and mBART. It costs nothing in beam search."""

    class Params(LogitsProcessor.Params):
        token_id: int = REQUIRED
        """The first token."""

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        return _only(scores, token=self.params.token_id) if view.ids.shape[-1] == 0 else scores


class ForcedEos(LogitsProcessor):
    """The last token that the length limit allows is the end token, at no cost in beam search."""

    class Params(LogitsProcessor.Params):
        pass

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        return torch.where(view.last.view(-1, 1, 1), _only(scores, token=view.eos_id), scores)


class SuppressedTokens(LogitsProcessor):
    """Tokens that never come, or do not come first."""

    class Params(LogitsProcessor.Params):
        token_ids: tuple[int, ...] = ()
        """Never these."""
        begin_token_ids: tuple[int, ...] = ()
        """Not these as the first token."""

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        ids = self.params.token_ids
        if view.ids.shape[-1] == 0:
            ids += self.params.begin_token_ids
        if not ids:
            return scores
        return scores.index_fill(-1, torch.tensor(ids, device=scores.device), NEG_INF)


class NoRepeatNgrams(LogitsProcessor):
    """No sequence of `size` tokens comes twice in one output."""

    class Params(LogitsProcessor.Params):
        size: int = REQUIRED
        """Length of the sequences; 1 forbids every repetition."""

        def validate(self) -> Iterator[str]:
            """Yields a size below 1."""
            if self.size < 1:
                yield f"size: must be at least 1, but is {self.size}. Leave the processor out to allow repetition."

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        size, ids = self.params.size, view.ids
        if ids.shape[-1] < size:
            return scores
        # [B, K, windows, size]: those whose first size - 1 tokens are the output's latest forbid their last token.
        windows = ids.unfold(-1, size, 1)
        latest = ids[..., ids.shape[-1] - (size - 1) :].unsqueeze(-2)
        same = (windows[..., :-1] == latest).all(dim=-1)
        return _forbid(scores, tokens=windows[..., -1], where=same)


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that came before less probable: positive scores are divided by `penalty`, negative ones multiplied
    (Keskar et al. 2019, arxiv.org/abs/1909.05858)."""

    class Params(LogitsProcessor.Params):
        penalty: float = REQUIRED
        """Above 1 discourages repetition, below 1 encourages it."""

        def validate(self) -> Iterator[str]:
            """Yields a penalty that is not positive."""
            if self.penalty <= 0:
                yield f"penalty: must be above 0, but is {self.penalty}. 1.0 changes nothing; 1.2 is common."

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        if view.ids.shape[-1] == 0:
            return scores
        penalty = self.params.penalty
        old = scores.gather(-1, view.ids)
        return scores.scatter(-1, view.ids, torch.where(old < 0, old * penalty, old / penalty))


class BadWords(LogitsProcessor):
    """Token sequences that never come."""

    class Params(LogitsProcessor.Params):
        sequences: tuple[tuple[int, ...], ...] = ()
        """Each is a sequence of one or more tokens."""

        def validate(self) -> Iterator[str]:
            """Yields an empty sequence."""
            if any(not sequence for sequence in self.sequences):
                yield "sequences: must hold one token or more each, but one is empty. Remove it."

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        ids = view.ids
        for sequence in self.params.sequences:
            before = len(sequence) - 1
            if before > ids.shape[-1]:
                continue
            start = torch.tensor(sequence[:-1], dtype=torch.long, device=ids.device)
            matches = (ids[..., ids.shape[-1] - before :] == start).all(dim=-1, keepdim=True)
            last = torch.full_like(matches, sequence[-1], dtype=torch.long)
            scores = _forbid(scores, tokens=last, where=matches)
        return scores


class ForcedTokens(LogitsProcessor):
    """The outputs of all sources begin with the same tokens, which cost what the model says. For a prefix of each
    source, hand `prefix` to the search."""

    class Params(LogitsProcessor.Params):
        token_ids: tuple[int, ...] = ()
        """The first tokens."""

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """See `LogitsProcessor`."""
        step = view.ids.shape[-1]
        if step >= len(self.params.token_ids):
            return scores
        forced = torch.full_like(scores, NEG_INF)
        token = self.params.token_ids[step]
        forced[..., token] = scores[..., token]
        return forced


def _forbid(scores: torch.Tensor, *, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Forbids `tokens` [B, K, n] in `scores` [B, K, V] where `where` [B, K, n] says so."""
    # Minimum, not assignment: a token may be listed both as forbidden and as not.
    bound = torch.where(where, NEG_INF, float("inf")).to(scores.dtype)
    return scores.scatter_reduce(-1, tokens, bound, reduce="amin")
