"""The loop that greedy search and sampling share: outputs that grow token by token and never compete."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from megaseq.base import NestedMap
from megaseq.decode.constraints import View, forbid_early_end, force_prefix
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepDecoder
from megaseq.decode.search import Limits, Search, check_eos, raise_nan
from megaseq.kernels.beam_step.log_softmax import log_probabilities


@dataclass
class Choice:
    """The chosen `tokens` [B, N] and their log-probability `sampled` [B, N] under what they were chosen from."""

    tokens: torch.Tensor
    sampled: torch.Tensor


class Walk(Search):
    """Extends each output by one chosen token until all outputs of a source have ended."""

    class Params(Search.Params):
        pass

    params: Params

    num_outputs: int = 1
    """Outputs for each source."""

    def choose(self, logits: torch.Tensor, *, keys: torch.Tensor, step: int) -> Choice:
        """Chooses the next tokens.

        Args:
            logits: fp32 [B, N, V], or [B, 1, V] at the first step, after all constraints.
            keys: [B] identity of each source, for random choices.
            step: How many tokens there are already.
        """
        raise NotImplementedError

    @torch.no_grad()
    def walk(
        self, decoder: StepDecoder, *, source: NestedMap, prefix: torch.Tensor | None, keys: torch.Tensor | None
    ) -> list[list[Hypothesis]]:
        """Decodes every row of `source`; see `Search.search`. `keys` [B] default to the rows' indices."""
        num = self.num_outputs
        start = self.start(decoder, source=source)
        num_sources, device = start.tokens.shape[0], start.tokens.device
        if num_sources == 0:
            return []
        outputs = _Outputs.empty(num_sources, num=num, limits=start.limits, keys=keys, device=device)
        done: list[list[Hypothesis]] = [[] for _ in range(num_sources)]
        state, tokens, step = start.state, start.tokens, 0
        while True:
            logits, state = decoder.step(state, tokens=tokens)
            fan_out = step == 0 and num > 1
            self._extend(outputs, logits=logits.view(outputs.rows.shape[0], -1, logits.shape[-1]), prefix=prefix)
            last = outputs.limits.most <= step + 1
            *flags, nan = torch.cat([outputs.ended.all(1) | last, outputs.logprob.isnan().any().view(1)]).tolist()
            if nan:
                raise_nan(step)
            step += 1
            if any(flags):
                leaving = outputs.take(torch.tensor([b for b, flag in enumerate(flags) if flag], device=device))
                for row, hypotheses in zip(leaving.rows.tolist(), leaving.hypotheses(), strict=True):
                    done[row] = hypotheses
            kept = torch.tensor([b for b, flag in enumerate(flags) if not flag], dtype=torch.long, device=device)
            if not kept.numel():
                break
            if any(flags) or fan_out:
                old = 1 if step == 1 else num
                hyps = torch.arange(num, device=device).clamp(max=old - 1).expand(kept.shape[0], num)
                state = decoder.select(state, sources=kept, hyps=hyps)
            if any(flags):
                outputs = outputs.take(kept)
            tokens = outputs.ids[..., -1].reshape(-1)
        return done

    def _extend(self, outputs: _Outputs, *, logits: torch.Tensor, prefix: torch.Tensor | None) -> None:
        """Adds one token to every output; `logits` [B, N or 1, V]."""
        p, step = self.params, outputs.ids.shape[-1]
        check_eos(logits, eos_id=self.eos_id)
        scores = logits.float()
        model = log_probabilities(scores)
        if self._constraints:
            # At the first step all outputs of a source share one row of scores.
            ids = outputs.ids[:, : scores.shape[1]]
            last = outputs.limits.most <= step + 1
            view = View(ids=ids, rows=outputs.rows, last=last, eos_id=self.eos_id)
            scores = self._constraints(scores, view=view)
        if p.min_seq_len > step or p.min_length_ratio > 0:
            scores = forbid_early_end(scores, step=step, least=outputs.limits.least, eos_id=self.eos_id)
        if prefix is not None and step < prefix.shape[1]:
            scores = force_prefix(scores, wanted=prefix[outputs.rows, step])
        choice = self.choose(scores, keys=outputs.keys, step=step)
        num = choice.tokens.shape[1]
        logprob = model.expand(-1, num, -1).gather(-1, choice.tokens.unsqueeze(-1)).squeeze(-1)
        outputs.extend(choice, model=logprob, eos_id=self.eos_id)


@dataclass
class _Outputs:
    """The growing outputs of the sources still in the batch.

    Attributes:
        rows: [B] index of each source in the batch that the search began with.
        keys: [B] identity of each source, for random choices.
        ids: [B, N, t] tokens so far; repeats of the end token behind the first.
        logprob: [B, N] under the model.
        sampled: [B, N] under what the tokens were chosen from.
        ended: [B, N].
        lengths: [B, N] tokens, the end token included.
        limits: Of each source.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    ids: torch.Tensor
    logprob: torch.Tensor
    sampled: torch.Tensor
    ended: torch.Tensor
    lengths: torch.Tensor
    limits: Limits

    @classmethod
    def empty(
        cls, num_sources: int, *, num: int, limits: Limits, keys: torch.Tensor | None, device: torch.device
    ) -> _Outputs:
        """Outputs without tokens."""
        rows = torch.arange(num_sources, device=device)
        zeros = torch.zeros(num_sources, num, device=device)
        return cls(
            rows=rows,
            keys=rows if keys is None else keys.to(device),
            ids=torch.zeros(num_sources, num, 0, dtype=torch.long, device=device),
            logprob=zeros,
            sampled=zeros,
            ended=torch.zeros_like(zeros, dtype=torch.bool),
            lengths=torch.zeros_like(zeros, dtype=torch.long),
            limits=limits,
        )

    def extend(self, choice: Choice, *, model: torch.Tensor, eos_id: int) -> None:
        """Adds the chosen tokens to the outputs that have not ended."""
        tokens = choice.tokens.masked_fill(self.ended, eos_id)
        self.ids = torch.cat([self.ids, tokens.unsqueeze(-1)], dim=-1)
        self.logprob = torch.where(self.ended, self.logprob, self.logprob + model)
        self.sampled = torch.where(self.ended, self.sampled, self.sampled + choice.sampled)
        self.lengths = self.lengths + self.ended.logical_not()
        self.ended = self.ended | (tokens == eos_id)

    def take(self, kept: torch.Tensor) -> _Outputs:
        """The outputs of some sources, `kept` [B']."""
        taken = {field.name: getattr(self, field.name)[kept] for field in fields(self) if field.name != "limits"}
        return _Outputs(**taken, limits=self.limits.take(kept))

    def hypotheses(self) -> list[list[Hypothesis]]:
        """The outputs of each source, in the order of the samples."""
        ended, scores, logprobs = self.ended.tolist(), self.sampled.tolist(), self.logprob.tolist()
        lengths, ids = (self.lengths - self.ended.long()).tolist(), self.ids.tolist()
        return [
            [
                Hypothesis(tuple(ids[b][n][: lengths[b][n]]), scores[b][n], logprobs[b][n], ended[b][n])
                for n in range(len(ids[b]))
            ]
            for b in range(len(ids))
        ]
