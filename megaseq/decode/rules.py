"""What a step of beam search decides, whichever loop runs it: which hypotheses end, and which sources are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaseq.decode import candidates, termination
from megaseq.decode.finished import Finished
from megaseq.decode.scoring import Scoring
from megaseq.kernels.beam_step.topk import NEG_INF

if TYPE_CHECKING:
    from megaseq.decode.beam_search import BeamSearch


class BeamRules:
    """The options of `BeamSearch.Params` as functions of tensors.

    Attributes:
        params: The options.
        eos: When an end-of-sequence token may end a hypothesis.
        scoring: How finished hypotheses are ranked.
        count: Extensions that each hypothesis proposes.
    """

    def __init__(self, p: BeamSearch.Params, *, eos_id: int) -> None:
        self.params = p
        self.eos = candidates.EosRule(eos_id, p.valid_eos_max_logit_delta, p.local_eos_threshold, p.force_eos_in_top_k)
        self.scoring = Scoring(p.length_normalization, p.length_penalty, p.coverage_penalty, p.target_seq_length_ratio)
        self.count = p.num_hyps_per_beam + 1 if p.candidates == "per_hyp" else 2 * p.num_hyps_per_beam

    def ended(
        self, proposals: candidates.Proposals, *, going: candidates.Extensions, last: torch.Tensor
    ) -> candidates.Extensions:
        """Which extensions end.

        Args:
            proposals: What the hypotheses propose, K each.
            going: The next beam, [B, K'].
            last: [B] sources in their last step.

        Returns:
            Extensions [B, K], or [B, K + K'] with `keep_unfinished`.
        """
        p, eos_id = self.params, self.eos.eos_id
        is_eos = proposals.ids == eos_id
        unfinished = going
        if p.candidates == "merged":
            best = candidates.merged_candidates(proposals, size=p.num_hyps_per_beam)
            unfinished = best.where(best.ids != eos_id)
            ranked = ((best.ids == eos_id) & (best.score > NEG_INF)).long()
            among = torch.zeros_like(is_eos[..., 0], dtype=torch.long).scatter_add(1, best.parents, ranked) > 0
        else:
            among = is_eos.any(dim=-1)
        force = last if p.force_eos_in_last_step else torch.zeros_like(last)
        ended = candidates.ended_hypotheses(proposals, among=among, rule=self.eos, force=force)
        if not p.keep_unfinished:
            return ended
        rest = unfinished.where(last.unsqueeze(1).expand_as(unfinished.score))
        return candidates.Extensions(
            torch.cat([ended.score, rest.score], dim=1),
            torch.cat([ended.parents, rest.parents], dim=1),
            torch.cat([ended.ids, rest.ids], dim=1),
        )

    def done(
        self,
        active: torch.Tensor,
        *,
        finished: Finished,
        rows: torch.Tensor,
        most: torch.Tensor,
        length: torch.Tensor | int,
    ) -> torch.Tensor:
        """Which sources the termination rule ends, [B].

        Args:
            active: [B, K] log-probabilities of the next beam.
            finished: What has ended so far.
            rows: [B], the sources' rows in `finished`.
            most: [B] steps that they may take.
            length: tokens of the next beam, the end token's place included; a number, or [1].
        """
        p, size = self.params, self.params.num_hyps_per_beam
        if p.termination == "score_gap":
            needed = size if p.ensure_full_beam else 0
            return termination.score_gap(active, finished=finished, rows=rows, gap=p.beam_size, needed=needed)
        reach = torch.full_like(most, length) if isinstance(length, int) else length.expand_as(most)
        exponent = p.length_normalization if p.length_penalty is None else p.length_penalty
        if p.termination == "never" and exponent > 0:
            reach = most
        done = termination.no_better(
            active, finished=finished, rows=rows, num_hyps=size, length=reach, scoring=self.scoring
        )
        if p.termination == "full_beam":
            done = done | termination.full_beam(finished=finished, rows=rows, num_hyps=size)
        return done
