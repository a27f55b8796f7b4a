"""One step of beam search as a pure function of tensors: which hypotheses end, and which go on.

The rules are those of Lingvo's beam search step. Each hypothesis proposes its best tokens; an end-of-sequence token
among them ends it; the best proposals of all hypotheses of a source, without those, are the next beam. The other way,
that of fairseq and transformers, merges first, and an end-of-sequence token counts when it is among the best K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaseq.kernels.beam_step.log_softmax import log_softmax_topk
from megaseq.kernels.beam_step.topk import NEG_INF, merged_topk, row_topk


@dataclass(frozen=True)
class EosRule:
    """When an end-of-sequence token may end a hypothesis; the attributes are those of `BeamSearch.Params`."""

    eos_id: int
    max_logit_delta: float
    local_threshold: float
    force_in_top_k: bool


@dataclass
class Proposals:
    """The best extensions of each hypothesis: `score` (of the whole hypothesis) and `ids`, both [B, K, N], and for the
    end-of-sequence token its `eos_score` [B, K] and whether it is `eos_allowed` [B, K] by the thresholds."""

    score: torch.Tensor
    ids: torch.Tensor
    eos_score: torch.Tensor
    eos_allowed: torch.Tensor


@dataclass(frozen=True)
class Best:
    """What a step gives of each hypothesis' next token where that is all that a search asks for: the best `values` and
    `ids` [R, N] of the log-probabilities, best first, and that of the end-of-sequence token, `eos` [R]."""

    values: torch.Tensor
    ids: torch.Tensor
    eos: torch.Tensor


@dataclass
class Extensions:
    """Some extensions, E of each source: hypothesis `score`, `parents` (which of the K) and `ids`, each [B, E]; a score
    of -inf means that there is none."""

    score: torch.Tensor
    parents: torch.Tensor
    ids: torch.Tensor

    def where(self, keep: torch.Tensor) -> Extensions:
        """The same with only those of `keep` [B, E] left."""
        return Extensions(self.score.masked_fill(~keep, NEG_INF), self.parents, self.ids)


def propose(scores: torch.Tensor, *, total: torch.Tensor, count: int, rule: EosRule) -> Proposals:
    """Takes the best `count` extensions of each hypothesis.

    Args:
        scores: [B, K, V] log-probabilities, fp32.
        total: [B, K] log-probability of each hypothesis so far; -inf where there is none.
        count: Extensions of each hypothesis; the vocabulary bounds it.
        rule: When an end-of-sequence token is allowed.
    """
    vocab = scores.shape[-1]
    values, ids = row_topk(scores.reshape(-1, vocab), k=count)
    return _proposals(values, ids=ids, eos_local=scores[..., rule.eos_id], total=total, rule=rule)


def propose_from_logits(logits: torch.Tensor, *, total: torch.Tensor, count: int, rule: EosRule) -> Proposals:
    """The same from logits [B * K, V] that no constraint changes."""
    return propose_best(Best(*log_softmax_topk(logits, k=count, column=rule.eos_id)), total=total, rule=rule)


def propose_best(best: Best, *, total: torch.Tensor, rule: EosRule) -> Proposals:
    """The same from the best of the logits, for R = B * K hypotheses."""
    return _proposals(best.values, ids=best.ids, eos_local=best.eos.view(total.shape), total=total, rule=rule)


def _proposals(
    values: torch.Tensor, *, ids: torch.Tensor, eos_local: torch.Tensor, total: torch.Tensor, rule: EosRule
) -> Proposals:
    batch, num_hyps = total.shape
    score = total.unsqueeze(-1) + values.view(batch, num_hyps, -1)
    eos_score = total + eos_local
    allowed = (eos_score >= score[..., 0] - rule.max_logit_delta) & (eos_local > rule.local_threshold)
    return Proposals(score, ids.view(batch, num_hyps, -1), eos_score, allowed)


def ended_hypotheses(proposals: Proposals, *, among: torch.Tensor, rule: EosRule, force: torch.Tensor) -> Extensions:
    """The hypotheses that an end-of-sequence token ends, one for each of the K.

    Args:
        proposals: What the hypotheses propose.
        among: [B, K] whether the token is among the candidates.
        rule: When it is allowed.
        force: [B] sources whose hypotheses all end here, whatever the thresholds say.
    """
    ends = proposals.eos_allowed if rule.force_in_top_k else among & proposals.eos_allowed
    ends = ends | force.unsqueeze(1)
    batch, num_hyps = proposals.eos_score.shape
    parents = torch.arange(num_hyps, device=ends.device).expand(batch, num_hyps)
    return Extensions(proposals.eos_score, parents, torch.full_like(parents, rule.eos_id)).where(ends)


def next_beam(proposals: Proposals, *, eos_id: int, size: int) -> Extensions:
    """The best `size` extensions of each source that go on, best first; ties to the lower token, then hypothesis."""
    return _best(proposals, score=proposals.score.masked_fill(proposals.ids == eos_id, NEG_INF), size=size)


def merged_candidates(proposals: Proposals, *, size: int) -> Extensions:
    """The best `size` extensions of each source, the end-of-sequence token among them."""
    return _best(proposals, score=proposals.score, size=size)


def _best(proposals: Proposals, *, score: torch.Tensor, size: int) -> Extensions:
    batch, num_hyps, count = score.shape
    ids = proposals.ids.reshape(batch, -1)
    parents = torch.arange(num_hyps, device=ids.device).repeat_interleave(count).expand(batch, -1)
    flat = score.reshape(batch, -1)
    missing = size - flat.shape[1]
    if missing > 0:
        # Fewer candidates than places: the rest of the beam stays empty.
        flat = torch.nn.functional.pad(flat, (0, missing), value=NEG_INF)
        ids = torch.nn.functional.pad(ids, (0, missing), value=0)
        parents = torch.nn.functional.pad(parents, (0, missing), value=0)
    best = merged_topk(flat, ranks=ids * num_hyps + parents, k=size)
    return Extensions(flat.gather(1, best), parents.gather(1, best), ids.gather(1, best))
