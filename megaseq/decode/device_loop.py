"""Beam search that stays on the device: no step waits for the host.

All tensors keep their shapes. Sources that are done stay in the batch, where what they would add counts for nothing;
the host looks every few steps, and then drops those that are done. What a step computes depends on the number of the
step only through a tensor, so that a CUDA graph may hold it (but not a forced prefix or processors, which change from
step to step).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from megaseq.decode import candidates
from megaseq.decode.constraints import Constraints, View, force_prefix
from megaseq.decode.finished import Finished
from megaseq.decode.loop_state import LoopState, Running
from megaseq.decode.protocol import StepDecoder, reorder, step_with_attention
from megaseq.decode.recorded_steps import Capture, RecordedSteps
from megaseq.decode.rules import BeamRules
from megaseq.decode.search import Start, check_eos, raise_nan
from megaseq.kernels.beam_step import StepRule, beam_step
from megaseq.kernels.beam_step.log_softmax import log_probabilities
from megaseq.kernels.beam_step.topk import NEG_INF


class DeviceLoop:
    """Runs a beam search of `BeamSearch.Params` without waiting for the host.

    The hypotheses, their scores and their order are those of the other loop.
    """

    def __init__(
        self,
        rules: BeamRules,
        *,
        constraints: Constraints,
        steps_between_looks: int,
        capture: Capture | None = None,
    ) -> None:
        """Makes a loop whose steps, with `capture`, are recorded by it and done again without Python."""
        self._rules = rules
        self._constraints = constraints
        self._steps_between_looks = steps_between_looks
        self._capture = capture
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
        run = Running(loop, start.state, start.tokens)
        do: Callable[[int], None] = functools.partial(self.step, run, decoder=decoder, prefix=prefix)
        recorded: RecordedSteps | None = None
        if self._capture is not None:
            do = recorded = RecordedSteps(
                do, run=run, decoder=decoder, capture=self._capture, num_hyps=p.num_hyps_per_beam, num_steps=num_steps,
                first=1 if prefix is None else max(1, prefix.shape[1]),
            )  # fmt: skip
        for step in range(num_steps):
            do(step)
            if step + 1 < num_steps and (step + 1) % self._steps_between_looks:
                continue
            kept, count = _look(run.loop), run.loop.rows.shape[0]
            # A recording is of one number of sources: a new one pays when it saves half.
            if len(kept) < count and (recorded is None or 2 * len(kept) <= count):
                if run.loop.finished is not everything:
                    everything.put(run.loop.rows, run.loop.finished)
                if not kept:
                    break
                _drop(run, kept=kept, decoder=decoder)
                if recorded is not None:
                    recorded.forget()
        return everything

    def step(self, run: Running, step: int, *, decoder: StepDecoder, prefix: torch.Tensor | None) -> None:
        """One step of the model and of the search. The number of the step is for `prefix` and processors alone."""
        loop = run.loop
        if self._rules.params.coverage_penalty:
            logits, attention, run.state = step_with_attention(decoder, state=run.state, tokens=run.tokens)
            loop.add_attention(attention)
        else:
            logits, run.state = decoder.step(run.state, tokens=run.tokens)
        check_eos(logits, eos_id=self._step_rule.eos_id)
        scores, normalised = self._constrained(logits, loop=loop, step=step, prefix=prefix)
        going = self.advance(loop, logits=scores, normalised=normalised, first=step == 0)
        run.state = reorder(decoder, state=run.state, sources=loop.places, hyps=going.parents)
        run.tokens = going.ids.reshape(-1)

    def advance(self, loop: LoopState, *, logits: torch.Tensor, normalised: bool, first: bool) -> candidates.Extensions:
        """One step after the model, in place: always the same operations on the same shapes, but for the `first`.

        Args:
            loop: Before the step; after it, the next beam.
            logits: [B * K, V], or log-probabilities where `normalised`.
            normalised: Whether constraints have changed them already.
            first: Whether there is one hypothesis a source.

        Returns:
            The next beam, [B, K'].
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
        return going

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


def _drop(run: Running, *, kept: list[int], decoder: StepDecoder) -> None:
    """Goes on with the sources `kept` alone."""
    num_hyps, device = run.loop.total.shape[1], run.tokens.device
    sources = torch.tensor(kept, device=device)
    same = torch.arange(num_hyps, device=device).expand(len(kept), num_hyps)
    run.state = decoder.select(run.state, sources=sources, hyps=same)
    run.tokens = run.tokens.view(-1, num_hyps)[sources].reshape(-1)
    run.loop = run.loop.take(sources)


def _of_parents(values: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """Rows [B, E, X] of `values` [B, K, X] at `parents` [B, E]."""
    return values.gather(1, parents.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _append(ids: torch.Tensor, *, step: torch.Tensor, ids_of_step: torch.Tensor) -> torch.Tensor:
    """Writes the tokens [B, E] of a step, [1], into `ids` [B, E, T]."""
    return ids.index_copy_(2, step, ids_of_step.unsqueeze(-1))
