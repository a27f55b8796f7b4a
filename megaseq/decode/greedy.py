"""Greedy search: the most probable token at every step."""

from __future__ import annotations

import torch

from megaseq.base import NestedMap
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepDecoder
from megaseq.decode.walk import Choice, Walk


class GreedySearch(Walk):
    """Takes the best token at every step, the lowest id among equals; one hypothesis for each source."""

    class Params(Walk.Params):
        pass

    params: Params

    def search(
        self,
        decoder: StepDecoder,
        *,
        source: NestedMap,
        prefix: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """Decodes every row of `source`; see `Search.search`."""
        return self.walk(decoder, source=source, prefix=prefix, keys=keys)

    def choose(self, logits: torch.Tensor, *, keys: torch.Tensor, step: int) -> Choice:
        """The best tokens; argmax takes the first of several equals."""
        best = logits.max(dim=-1, keepdim=True).values
        # torch.argmax leaves open which of several equal values it finds.
        tokens = (logits == best).int().argmax(dim=-1) if logits.is_cuda else logits.argmax(dim=-1)
        return Choice(tokens=tokens, sampled=best.squeeze(-1) - logits.logsumexp(dim=-1))


def greedy_search(
    decoder: StepDecoder, *, source: NestedMap, params: GreedySearch.Params, prefix: torch.Tensor | None = None
) -> list[list[Hypothesis]]:
    """Greedy search in one call; see `GreedySearch`."""
    search: GreedySearch = params.instantiate()
    return search.search(decoder, source=source, prefix=prefix)
