"""Sampling: temperature and the ways to cut off the tail, reproducible example by example."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megaseq.base import NestedMap
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepDecoder
from megaseq.decode.random_bits import uniform
from megaseq.decode.walk import Choice, Walk
from megaseq.kernels.beam_step.topk import NEG_INF, row_topk


class Sampler(Walk):
    """Draws outputs from the model's distribution, or from what the options leave of it.

    The draw of a token is a pure function of (seed, source, sample, step) and of its logits: neither the batch that a
    source is decoded in nor the number of samples changes it.
    """

    class Params(Walk.Params):
        num_samples: int = 1
        """Outputs for each source."""
        seed: int = 1
        """Another seed draws other samples."""
        temperature: float = 1.0
        """Divides the logits: above 1 flatter, below 1 sharper."""
        top_k: int = 0
        """When above 0, draw from the best tokens only; ties to the lower id."""
        top_k_renormalize: bool = True
        """Whether the options below see the probabilities of those tokens alone, or of the whole vocabulary."""
        nucleus_p: float = 1.0
        """When below 1, draw from the smallest set of tokens with this probability (arxiv.org/abs/1904.09751)."""
        min_p: float = 0.0
        """When above 0, drop tokens less probable than this fraction of the best (arxiv.org/abs/2407.01082)."""
        epsilon: float = 0.0
        """When above 0, drop tokens less probable than this."""
        eps_fail_safe: bool = True
        """Take the best token when `epsilon` would drop all; otherwise `epsilon` is ignored there."""

        def validate(self) -> Iterator[str]:
            """Yields values out of range."""
            yield from super().validate()
            if self.num_samples < 1:
                yield f"num_samples: must be at least 1, but is {self.num_samples}. Use 1 for a single output."
            if self.temperature <= 0:
                yield f"temperature: must be above 0, but is {self.temperature}. Use GreedySearch for the limit 0."
            if self.top_k < 0:
                yield f"top_k: must not be negative, but is {self.top_k}. Use 0 to turn it off."
            if not 0 < self.nucleus_p <= 1:
                yield f"nucleus_p: must be in (0, 1], but is {self.nucleus_p}. Use 1.0 to turn it off."
            for name in ("min_p", "epsilon"):
                value = getattr(self, name)
                if not 0 <= value < 1:
                    yield f"{name}: must be in [0, 1), but is {value}. Use 0.0 to turn it off."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.num_outputs = p.num_samples

    def search(
        self,
        decoder: StepDecoder,
        *,
        source: NestedMap,
        prefix: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """Draws `num_samples` outputs of each row of `source`, in the order of the samples.

        Args:
            decoder: The model.
            source: What `decoder.prefill` takes, B rows, on the device of the model.
            prefix: [B, P] tokens that the outputs must begin with; a negative id leaves that position free.
            keys: [B] identity of each source, its index in the corpus, say, for draws that do not depend on how the
                corpus was batched; the row's index by default.
        """
        return self.walk(decoder, source=source, prefix=prefix, keys=keys)

    def choose(self, logits: torch.Tensor, *, keys: torch.Tensor, step: int) -> Choice:
        """Draws by inverting the cumulative distribution at one uniform number for each output."""
        logprobs = self.truncated(logits)
        samples = torch.arange(self.num_outputs, device=logits.device)
        draw = uniform(self.params.seed, keys.unsqueeze(1), samples, step)
        # Double precision: a float32 sum over a large vocabulary loses the tokens of its tail.
        cumulative = logprobs.exp().double().cumsum(dim=-1).contiguous()
        # At the first step all samples of a source look into its one row, [B, 1, N]; later each has its own, [B, N, 1].
        draw = draw.view(draw.shape[0], logprobs.shape[1], -1)
        total = cumulative[..., -1:].contiguous()
        # `right`: the first token whose cumulative probability is above the target; so never one of probability 0.
        tokens = torch.searchsorted(cumulative, draw * total, right=True)
        # Rounding may make the target the total itself: then the first token that reaches the total.
        tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total)).view(draw.shape[0], -1)
        logprobs = logprobs.expand(-1, self.num_outputs, -1)
        return Choice(tokens=tokens, sampled=logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))

    def truncated(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities that tokens are drawn with, [..., V]; -inf for those cut off."""
        p = self.params
        logits = logits.float() / p.temperature
        vocab = logits.shape[-1]
        logprobs = logits.log_softmax(dim=-1)
        if 0 < p.top_k < vocab:
            _, ids = row_topk(logits.reshape(-1, vocab), k=p.top_k)
            keep = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids.view(*logits.shape[:-1], -1), True)
            logprobs = logprobs.masked_fill(~keep, NEG_INF)
            if p.top_k_renormalize:
                logprobs = logprobs.log_softmax(dim=-1)
        if p.nucleus_p < 1:
            ordered, ids = logprobs.sort(dim=-1, descending=True, stable=True)
            probs = ordered.exp()
            # A token stays while those before it have not reached the mass; the first always stays.
            outside = probs.cumsum(dim=-1) - probs >= p.nucleus_p
            logprobs = logprobs.masked_fill(outside.gather(-1, ids.argsort(dim=-1)), NEG_INF).log_softmax(dim=-1)
        if p.min_p > 0:
            best = logprobs.amax(dim=-1, keepdim=True)
            logprobs = logprobs.masked_fill(logprobs.exp() < p.min_p * best.exp(), NEG_INF).log_softmax(dim=-1)
        if p.epsilon > 0:
            logprobs = self._above_epsilon(logprobs)
        return logprobs

    def _above_epsilon(self, logprobs: torch.Tensor) -> torch.Tensor:
        p = self.params
        dropped = logprobs.exp() < p.epsilon
        all_dropped = dropped.all(dim=-1, keepdim=True)
        best = logprobs.argmax(dim=-1, keepdim=True)
        only_best = torch.ones_like(dropped).scatter(-1, best, False)
        fallback = only_best if p.eps_fail_safe else torch.zeros_like(dropped)
        return logprobs.masked_fill(torch.where(all_dropped, fallback, dropped), NEG_INF).log_softmax(dim=-1)


def sample(
    decoder: StepDecoder,
    *,
    source: NestedMap,
    params: Sampler.Params,
    prefix: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Sampling in one call; see `Sampler.search`."""
    sampler: Sampler = params.instantiate()
    return sampler.search(decoder, source=source, prefix=prefix, keys=keys)
