"""Beam search that stays on the device: no step waits for the host.

All tensors keep their shapes. Sources that are done stay in the batch, where what they would add counts for nothing;
the host looks every few steps, and then drops those that are done. What a step computes depends on the number of the
step only through a tensor, so that a CUDA graph may hold it (but not a forced prefix or processors, which change from
step to step).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from megaseq.decode import candidates
from megaseq.decode.constraints import Constraints, View, force_prefix
from megaseq.decode.finished import Finished
from megaseq.decode.protocol import State, StepDecoder, reorder, step_with_attention
from megaseq.decode.rules import BeamRules
from megaseq.decode.search import Start, check_eos, raise_nan
from megaseq.kernels.beam_step import StepRule, beam_step
from megaseq.kernels.beam_step.log_softmax import log_probabilities
from megaseq.kernels.beam_step.topk import NEG_INF


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

    def take(self, kept: torch.Tensor) -> LoopState:
        """The state of some sources, `kept` [B']."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and name not in ("step", "nan_step", "places"):
                setattr(new, name, value[kept])
        new.places, new.finished = self.places[: kept.shape[0]], self.finished.take(kept)
        return new


class DeviceLoop:
    """Runs a beam search of `BeamSearch.Params` without waiting for the host.

    The hypotheses, their scores and their order are those of the other loop.
    """

    def __init__(self, rules: BeamRules, *, constraints: Constraints, steps_between_looks: int) -> None:
        self._rules = rules
        self._constraints = constraints
        self._steps_between_looks = steps_between_looks
        p, eos = rules.params, rules.eos
        self._step_rule = StepRule(
            eos.eos_id, rules.count, p.num_hyps_per_beam, eos.max_logit_delta, eos.local_threshold
        )

    def search(self, decoder: StepDecoder, *, start: Start, num_steps: int, prefix: torch.Tensor | None) -> Finished:
        """Decodes all sources; returns what has finished of each.

        Args:
            decoder: The model. Its `reorder`, where it has one, is what the steps call; without, `select`.
            start: After prefill.
            num_steps: The most steps that a source may take.
            prefix: As in `Search.search`.

        Raises:
            DecodeError: As in `Search.search`; NaN is found at the next look.
        """
        p = self._rules.params
        covered = p.coverage_penalty != 0.0
        loop = LoopState.begin(start, size=max(p.num_hyps_per_beam, p.num_best), num_steps=num_steps, covered=covered)
        everything = loop.finished
        decoder_state, tokens = start.state, start.tokens
        for step in range(num_steps):
            if covered:
                logits, attention, decoder_state = step_with_attention(decoder, state=decoder_state, tokens=tokens)
                loop.add_attention(attention)
            else:
                logits, decoder_state = decoder.step(decoder_state, tokens=tokens)
            check_eos(logits, eos_id=self._step_rule.eos_id)
            scores, normalised = self._constrained(logits, loop=loop, step=step, prefix=prefix)
            hyps = self.advance(loop, logits=scores, normalised=normalised, first=step == 0)
            if step + 1 == num_steps or (step + 1) % self._steps_between_looks == 0:
                kept = _look(loop)
                if len(kept) < loop.rows.shape[0]:
                    if loop.finished is not everything:
                        everything.put(loop.rows, loop.finished)
                    if not kept:
                        break
                    loop, hyps, decoder_state = _drop(loop, hyps, decoder_state, kept=kept, decoder=decoder)
                    tokens = loop.ids[..., step].reshape(-1)
                    continue
            decoder_state = reorder(decoder, state=decoder_state, sources=loop.places, hyps=hyps)
            tokens = loop.ids[..., step].reshape(-1)
        return everything

    def advance(self, loop: LoopState, *, logits: torch.Tensor, normalised: bool, first: bool) -> torch.Tensor:
        """One step after the model, in place: always the same operations on the same shapes, but for the `first`.

        Args:
            loop: Before the step; after it, the next beam.
            logits: [B * K, V], or log-probabilities where `normalised`.
            normalised: Whether constraints have changed them already.
            first: Whether there is one hypothesis a source.

        Returns:
            [B, K'], the hypothesis that each of the next beam goes on.
        """
        p, eos_id = self._rules.params, self._rules.eos.eos_id
        last = loop.most <= loop.step + 1
        early = p.min_seq_len > 0 or p.min_length_ratio > 0
        step = beam_step(
            logits, total=loop.total, rule=self._step_rule, forbid_eos=loop.least > loop.step if early else None,
            normalised=normalised,
        )  # fmt: skip
        nan = (step.score[..., 0].isnan().any(dim=1) & loop.active).any().view(1)
        loop.nan_step = torch.where(nan & (loop.nan_step < 0), loop.step, loop.nan_step)
        proposals = candidates.Proposals(step.score, step.ids, step.eos_score, step.eos_allowed)
        going = candidates.Extensions(step.next_score, step.next_parents, step.next_ids)
        ended = self._rules.ended(proposals, going=going, last=last)
        ended = ended.where(loop.active.unsqueeze(1).expand_as(ended.score))
        if first and not p.allow_empty_terminated_hyp:
            ended = ended.where(ended.ids != eos_id)
        self._finish(loop, ended=ended)
        done = self._rules.done(
            going.score, finished=loop.finished, rows=loop.places, most=loop.most, length=loop.step + 1
        )
        if not p.terminate_beams_independently:
            done = (done | ~loop.active).all().expand_as(done)
        loop.active = loop.active & ~(done | last | (going.score[:, 0] == NEG_INF))
        loop.ids = _append(_of_parents(loop.ids, going.parents), step=loop.step, ids_of_step=going.ids)
        if loop.attention is not None:
            loop.attention = _of_parents(loop.attention, going.parents)
        # Those of sources that are done are worth nothing, so that nothing of them is NaN or ends.
        loop.total = going.score.masked_fill(~loop.active.unsqueeze(1), NEG_INF)
        loop.step = loop.step + 1
        return going.parents

    def _finish(self, loop: LoopState, *, ended: candidates.Extensions) -> None:
        """Puts what ended in this step on the n-best lists."""
        score = ended.score / self._rules.scoring.norm(loop.step + 1)
        if loop.attention is not None and loop.lengths is not None:
            positions = torch.arange(loop.attention.shape[-1], device=score.device)
            mask = (positions < loop.lengths.unsqueeze(1)).unsqueeze(1)
            score = score + self._rules.scoring.coverage(_of_parents(loop.attention, ended.parents), mask=mask)
        is_eos = ended.ids == self._rules.eos.eos_id
        loop.finished.add(
            loop.places,
            score=score.masked_fill(ended.score == NEG_INF, NEG_INF),
            logprob=ended.score,
            ids=_append(_of_parents(loop.ids, ended.parents), step=loop.step, ids_of_step=ended.ids),
            lengths=loop.step + is_eos.logical_not(),
            ended=is_eos,
        )

    def _constrained(
        self, logits: torch.Tensor, *, loop: LoopState, step: int, prefix: torch.Tensor | None
    ) -> tuple[torch.Tensor, bool]:
        """Log-probabilities [B * K, V] after constraints and True, or the logits where there are none and False."""
        forced = prefix is not None and step < prefix.shape[1]
        if not (self._constraints or forced):
            return logits, False
        scores = log_probabilities(logits).view(*loop.total.shape, -1)
        if self._constraints:
            last = loop.most <= step + 1
            view = View(ids=loop.ids[..., :step], rows=loop.rows, last=last, eos_id=self._rules.eos.eos_id)
            scores = self._constraints(scores, view=view)
        if prefix is not None and forced:
            scores = force_prefix(scores, wanted=prefix[loop.rows, step])
        return scores.flatten(0, 1), True


def _look(loop: LoopState) -> list[int]:
    """Reads back which sources are not done: the only time that the host waits."""
    nan_step, *active = torch.cat([loop.nan_step, loop.active.long()]).tolist()
    if nan_step >= 0:
        raise_nan(nan_step)
    return [place for place, flag in enumerate(active) if flag]


def _drop(
    loop: LoopState, hyps: torch.Tensor, state: State, *, kept: list[int], decoder: StepDecoder
) -> tuple[LoopState, torch.Tensor, State]:
    """Goes on with the sources `kept` alone."""
    sources = torch.tensor(kept, device=hyps.device)
    hyps = hyps[sources]
    return loop.take(sources), hyps, decoder.select(state, sources=sources, hyps=hyps)


def _of_parents(values: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """Rows [B, E, X] of `values` [B, K, X] at `parents` [B, E]."""
    return values.gather(1, parents.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _append(ids: torch.Tensor, *, step: torch.Tensor, ids_of_step: torch.Tensor) -> torch.Tensor:
    """Writes the tokens [B, E] of a step, [1], into `ids` [B, E, T]."""
    return ids.index_copy_(2, step, ids_of_step.unsqueeze(-1))
