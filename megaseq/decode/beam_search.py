"""Beam search with Lingvo's options and semantics, and those of fairseq and transformers where they differ.

Every quantity is a tensor over sources and hypotheses; a step reads back from the device once, to learn which sources
are finished. Those leave the batch, so that late steps cost only what the unfinished ones need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megaseq.base import NestedMap
from megaseq.base.errors import must
from megaseq.decode import candidates
from megaseq.decode.constraints import View, forbid_early_end, force_prefix
from megaseq.decode.device_loop import DeviceLoop
from megaseq.decode.errors import DecodeError
from megaseq.decode.finished import Finished
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepBest, StepDecoder, step_with_attention
from megaseq.decode.recorded_steps import Capture, capture_cuda_graph
from megaseq.decode.rules import BeamRules
from megaseq.decode.search import Limits, Search, check_eos, raise_nan
from megaseq.kernels.beam_step.log_softmax import log_probabilities, log_softmax_topk
from megaseq.kernels.beam_step.topk import NEG_INF


class BeamSearch(Search):
    """Searches for the most probable outputs, `num_hyps_per_beam` hypotheses abreast."""

    class Params(Search.Params):
        num_hyps_per_beam: int = 8
        """Hypotheses kept for each source."""
        num_best: int = 1
        """Finished hypotheses returned for each source, at most."""
        beam_size: float = 3.0
        """A score gap, not a number: a source is done when all its active hypotheses are this much less probable, in
        nats, than its best finished one."""
        length_normalization: float = 0.0
        """Exponent of (length + 5) / 5, which log-probabilities are divided by; the length counts the end token."""
        length_penalty: float | None = None
        """Exponent of the plain length, as in fairseq and transformers; instead of `length_normalization`."""
        coverage_penalty: float = 0.0
        """Weight of the coverage term (beta of Wu et al. 2016); needs a decoder that reports its attention."""
        target_seq_length_ratio: float = 1.0
        """Mean target length over mean source length, for the coverage term."""
        valid_eos_max_logit_delta: float = 5.0
        """The end token may end a hypothesis only within this distance of the hypothesis' best token."""
        local_eos_threshold: float = -100.0
        """The end token may end a hypothesis only when its log-probability is above this."""
        ensure_full_beam: bool = False
        """A source is done only when `num_hyps_per_beam` hypotheses have finished, and the score gap is reached."""
        terminate_beams_independently: bool = True
        """Each source stops on its own and leaves the batch; otherwise all go on until all are done, which is
        Lingvo's default (False) and lets a source's result depend on the others of its batch."""
        force_eos_in_top_k: bool = False
        """Consider the end token at every step, not only when it is among a hypothesis' best tokens."""
        force_eos_in_last_step: bool = True
        """End what is still active in the last step with the end token. Lingvo's default is False, which returns
        nothing for a source whose outputs all run into the length limit."""
        keep_unfinished: bool = False
        """Return what is still active in the last step as it is, not ended, as transformers does; needs
        `force_eos_in_last_step=False`."""
        allow_empty_terminated_hyp: bool = True
        """Whether the end token may come first."""
        candidates: Literal["per_hyp", "merged"] = "per_hyp"
        """Where the end token must rank to count: among the best K + 1 tokens of its hypothesis (Lingvo), or among the
        best K extensions of all hypotheses of the source (fairseq, transformers)."""
        termination: Literal["score_gap", "full_beam", "heuristic", "never"] = "score_gap"
        """`score_gap`: `beam_size` decides (Lingvo). The others are transformers' `early_stopping` True, False and
        "never": stop at K finished; when the best active one scores no better at its present length than the K-th
        finished; or would score no better at the longest possible length."""

        device_loop: bool | None = None
        """Whether sources that are done stay in the batch, masked, so that no step waits for the host; otherwise they
        leave at once, and late steps cost only what is left. The outputs are the same. None: on a GPU, unless the
        logits lie on another one."""
        device_loop_steps: int = 16
        """With `device_loop`: steps after which the host looks which sources are done, and drops those."""
        device_loop_graph: bool = False
        """With `device_loop`: whether a step is recorded in a CUDA graph and done again from it, which saves Python's
        time for each op; sources that are done are dropped when they are half of the batch. Needs a GPU and a model
        whose steps wait for nothing; not with processors, and steps of a forced prefix are not recorded."""

        def validate(self) -> Iterator[str]:
            """Yields options that contradict each other."""
            yield from super().validate()
            for name in ("num_hyps_per_beam", "num_best", "device_loop_steps"):
                if getattr(self, name) < 1:
                    yield f"{name}: must be at least 1, but is {getattr(self, name)}. Use 1 or more."
            if self.beam_size <= 0:
                yield f"beam_size: must be above 0, but is {self.beam_size}. It is a gap in nats; the default is 3.0."
            if self.target_seq_length_ratio <= 0:
                yield f"target_seq_length_ratio: must be above 0, but is {self.target_seq_length_ratio}. Use 1.0."
            if self.length_penalty is not None and self.length_normalization:
                yield "length_penalty: must be None with length_normalization, but both are set. Keep one of the two."
            if self.device_loop_graph and (self.processors or self.device_loop is False):
                other = "processors, which change from step to step" if self.processors else "device_loop=False"
                yield f"device_loop_graph: must be False with {other}, but is True. Leave it out."
            if self.keep_unfinished and self.force_eos_in_last_step:
                yield "keep_unfinished: must be False with force_eos_in_last_step, but both are set. Keep one."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._rules = BeamRules(p, eos_id=self.eos_id)

    @torch.no_grad()
    def search(
        self,
        decoder: StepDecoder,
        *,
        source: NestedMap,
        prefix: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """Decodes every row of `source`; returns up to `num_best` hypotheses of each source, best first.

        Args:
            decoder: The model.
            source: What `decoder.prefill` takes, B rows, on the device of the model.
            prefix: [B, P] tokens that the outputs must begin with; a negative id leaves that position free. They count
                in the score.
            keys: Of no use here: nothing is random.

        Raises:
            DecodeError: The model gives NaN, or the coverage penalty meets a model without attention.
        """
        p = self.params
        start = self.start(decoder, source=source)
        num_sources, device = start.tokens.shape[0], start.tokens.device
        if num_sources == 0:
            return []
        num_steps = int(start.limits.most.max())
        step_best = self._step_best(decoder, prefix=prefix)
        if (start.tokens.is_cuda and step_best is None) if p.device_loop is None else p.device_loop:
            loop = DeviceLoop(
                self._rules,
                constraints=self._constraints,
                steps_between_looks=p.device_loop_steps,
                capture=self._capture(device),
            )
            found = loop.search(decoder, start=start, num_steps=num_steps, prefix=prefix)
            return found.hypotheses(num_best=p.num_best)
        if p.device_loop_graph:
            raise must(
                "device_loop_graph", "be False where the loop does not stay on the device", True,
                f"Leave it out: the model is on {device}", kind=DecodeError,
            )  # fmt: skip
        size = max(p.num_hyps_per_beam, p.num_best)
        finished = Finished(num_sources, size=size, steps=num_steps, device=device)
        beam = _Beam(
            rows=torch.arange(num_sources, device=device),
            total=torch.zeros(num_sources, 1, device=device),
            ids=torch.zeros(num_sources, 1, 0, dtype=torch.long, device=device),
            limits=start.limits,
        )
        if p.coverage_penalty:
            beam.lengths = start.lengths
        state, tokens, step = start.state, start.tokens, 0
        seen: torch.Tensor | candidates.Best
        while beam.rows.numel():
            if p.coverage_penalty:
                seen, attention, state = step_with_attention(decoder, state=state, tokens=tokens)
                beam.add_attention(attention)
            elif step_best is not None:
                top, state = step_best(state, tokens=tokens, best=self._best, count=self._rules.count)
                seen = candidates.Best(*top)
            else:
                seen, state = decoder.step(state, tokens=tokens)
            parents = self._advance(beam, seen=seen, step=step, finished=finished, prefix=prefix)
            if parents is not None:
                if beam.rows.numel() == 0:
                    break
                state = decoder.select(state, sources=parents.sources, hyps=parents.hyps)
            tokens = beam.ids[..., -1].reshape(-1)
            step += 1
        return finished.hypotheses(num_best=p.num_best)

    def _capture(self, device: torch.device) -> Capture | None:
        """Returns what records steps, None where none are to be.

        Raises:
            DecodeError: They are to be, and `device` is no GPU.
        """
        if not self.params.device_loop_graph:
            return None
        if device.type != "cuda":
            raise must("device_loop_graph", "be False where there is no GPU", True, "Leave it out", kind=DecodeError)
        return capture_cuda_graph

    def _best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return log_softmax_topk(logits, k=self._rules.count, column=self.eos_id)

    def _step_best(self, decoder: StepDecoder, *, prefix: torch.Tensor | None) -> StepBest | None:
        """Returns the decoder's way to give the best tokens alone, where it has one and nothing reads the others."""
        p = self.params
        if self._constraints or p.min_seq_len or p.min_length_ratio or p.coverage_penalty or prefix is not None:
            return None
        if self.eos_id >= getattr(decoder, "vocab_size", 0):
            return None  # All ranks are to say so, and not only the one that has the logits.
        found: StepBest | None = getattr(decoder, "step_best", None)
        return found

    def _advance(
        self,
        beam: _Beam,
        *,
        seen: torch.Tensor | candidates.Best,
        step: int,
        finished: Finished,
        prefix: torch.Tensor | None,
    ) -> _Parents | None:
        """One step after the model: updates `beam` and `finished`; returns what the decoder must select, or None."""
        p = self.params
        last = beam.limits.most <= step + 1
        if isinstance(seen, candidates.Best):
            proposals = candidates.propose_best(seen, total=beam.total, rule=self._rules.eos)
        else:
            proposals = self._propose(beam, logits=seen, step=step, last=last, prefix=prefix)
        going = candidates.next_beam(proposals, eos_id=self.eos_id, size=p.num_hyps_per_beam)
        ended = self._rules.ended(proposals, going=going, last=last)
        if step == 0 and not p.allow_empty_terminated_hyp:
            ended = ended.where(ended.ids != self.eos_id)
        has_ended = ended.score > NEG_INF
        # On a GPU, looking whether there is anything to add would cost more than adding nothing.
        if has_ended.is_cuda or bool(has_ended.any()):
            self._finish(beam, ended=ended, finished=finished)

        done = self._rules.done(going.score, finished=finished, rows=beam.rows, most=beam.limits.most, length=step + 1)
        if not p.terminate_beams_independently:
            done = done.all().expand_as(done)
        done = done | last | (going.score[:, 0] == NEG_INF)
        num_hyps = beam.total.shape[1]
        same = num_hyps == p.num_hyps_per_beam
        in_place = torch.arange(p.num_hyps_per_beam, device=done.device)
        moved = (going.parents != in_place).any().view(1)
        nan = proposals.score[..., 0].isnan().any().view(1)
        *flags, any_moved, any_nan = torch.cat([done, moved, nan]).tolist()
        if any_nan:
            raise_nan(step)

        if any(flags):
            kept = torch.tensor([b for b, flag in enumerate(flags) if not flag], dtype=torch.long, device=done.device)
            going = candidates.Extensions(going.score[kept], going.parents[kept], going.ids[kept])
            beam.keep(kept)
        elif same and not any_moved:
            beam.extend(going)
            return None
        else:
            kept = torch.arange(len(flags), device=done.device)
        beam.extend(going)
        return _Parents(sources=kept, hyps=going.parents)

    def _propose(
        self, beam: _Beam, *, logits: torch.Tensor, step: int, last: torch.Tensor, prefix: torch.Tensor | None
    ) -> candidates.Proposals:
        """The best extensions of every hypothesis, after all constraints."""
        p = self.params
        batch, num_hyps = beam.total.shape
        check_eos(logits, eos_id=self.eos_id)
        count, rule = self._rules.count, self._rules.eos
        early = p.min_seq_len > step or p.min_length_ratio > 0
        forced = prefix is not None and step < prefix.shape[1]
        if not (self._constraints or early or forced):
            return candidates.propose_from_logits(logits, total=beam.total, count=count, rule=rule)
        scores = log_probabilities(logits).view(batch, num_hyps, -1)
        if self._constraints:
            view = View(ids=beam.ids, rows=beam.rows, last=last, eos_id=self.eos_id)
            scores = self._constraints(scores, view=view)
        if early:
            scores = forbid_early_end(scores, step=step, least=beam.limits.least, eos_id=self.eos_id)
        if prefix is not None and forced:
            scores = force_prefix(scores, wanted=prefix[beam.rows, step])
        return candidates.propose(scores, total=beam.total, count=count, rule=rule)

    def _finish(self, beam: _Beam, *, ended: candidates.Extensions, finished: Finished) -> None:
        """Puts what ended in this step on the n-best lists."""
        ids = torch.cat([beam.ids_of(ended.parents), ended.ids.unsqueeze(-1)], dim=-1)
        length = torch.full((1,), ids.shape[-1], device=ids.device)
        score = ended.score / self._rules.scoring.norm(length)
        if beam.attention is not None:
            score = score + self._rules.scoring.coverage(beam.attention_of(ended.parents), mask=beam.source_mask())
        score = score.masked_fill(ended.score == NEG_INF, NEG_INF)
        is_eos = ended.ids == self.eos_id
        lengths = is_eos.logical_not().long() + (ids.shape[-1] - 1)
        finished.add(beam.rows, score=score, logprob=ended.score, ids=ids, lengths=lengths, ended=is_eos)


@dataclass
class _Parents:
    """What the decoder must select: `sources` [B'], `hyps` [B', K]."""

    sources: torch.Tensor
    hyps: torch.Tensor


@dataclass
class _Beam:
    """The active hypotheses of the sources still in the batch.

    Attributes:
        rows: [B] index of each source in the batch that the search began with.
        total: [B, K] log-probability so far; -inf where there is no hypothesis.
        ids: [B, K, t] tokens so far.
        limits: Of each source.
        lengths: [B] source lengths, with a coverage penalty only.
        attention: [B, K, S] attention summed over the steps, with a coverage penalty only.
    """

    rows: torch.Tensor
    total: torch.Tensor
    ids: torch.Tensor
    limits: Limits
    lengths: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    def add_attention(self, attention: torch.Tensor) -> None:
        """Adds one step's attention, [B * K, S]."""
        new = attention.float().view(*self.total.shape, -1)
        self.attention = new if self.attention is None else self.attention + new

    def ids_of(self, parents: torch.Tensor) -> torch.Tensor:
        """The tokens of `parents` [B, E], [B, E, t]."""
        return self.ids.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.ids.shape[-1]))

    def attention_of(self, parents: torch.Tensor) -> torch.Tensor:
        """The summed attention of `parents` [B, E], [B, E, S]."""
        assert self.attention is not None
        return self.attention.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.attention.shape[-1]))

    def source_mask(self) -> torch.Tensor:
        """True at real source positions, [B, 1, S]."""
        assert self.attention is not None and self.lengths is not None
        positions = torch.arange(self.attention.shape[-1], device=self.lengths.device)
        return (positions < self.lengths.unsqueeze(1)).unsqueeze(1)

    def keep(self, kept: torch.Tensor) -> None:
        """Drops all sources but `kept` [B']."""
        self.rows, self.total, self.ids = self.rows[kept], self.total[kept], self.ids[kept]
        self.limits = self.limits.take(kept)
        if self.lengths is not None:
            self.lengths = self.lengths[kept]
        if self.attention is not None:
            self.attention = self.attention[kept]

    def extend(self, going: candidates.Extensions) -> None:
        """Replaces the hypotheses by their extensions, [B, K]."""
        self.ids = torch.cat([self.ids_of(going.parents), going.ids.unsqueeze(-1)], dim=-1)
        if self.attention is not None:
            self.attention = self.attention_of(going.parents)
        self.total = going.score


def beam_search(
    decoder: StepDecoder, *, source: NestedMap, params: BeamSearch.Params, prefix: torch.Tensor | None = None
) -> list[list[Hypothesis]]:
    """Beam search in one call; see `BeamSearch.search`."""
    search: BeamSearch = params.instantiate()
    return search.search(decoder, source=source, prefix=prefix)
