"""A step of beam search in plain torch: what every other implementation must compute. It reads nothing back."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.beam_step.log_softmax import log_softmax_topk
from megaseq.kernels.beam_step.rule import BeamStep, StepRule
from megaseq.kernels.beam_step.topk import NEG_INF, merged_topk

NAN = float("nan")


def reference_beam_step(
    logits: Tensor, *, total: Tensor, rule: StepRule, forbid_eos: Tensor | None, normalised: bool
) -> BeamStep:
    """`beam_step`, all of the vocabulary's log-probabilities written out; see there."""
    num_hyps = total.shape[1]
    scores = logits.float()
    if not normalised:
        dead = (scores == NEG_INF).all(dim=-1, keepdim=True)
        scores = scores.log_softmax(dim=-1).masked_fill(dead, NEG_INF)
    broken = scores.isnan().any(dim=-1, keepdim=True)
    if forbid_eos is not None:
        early = forbid_eos.repeat_interleave(num_hyps).unsqueeze(1)
        is_eos = torch.arange(scores.shape[1], device=scores.device) == rule.eos_id
        scores = scores.masked_fill(early & is_eos, NEG_INF)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    ids = merged_topk(scores, ranks=ranks, k=min(rule.count, scores.shape[1]))
    values = scores.gather(-1, ids).masked_fill(broken, NAN)
    ids = torch.where(broken, torch.arange(ids.shape[1], device=ids.device), ids)
    eos_local = scores[:, rule.eos_id].masked_fill(broken.squeeze(1), NAN)
    return merge(values, ids=ids, eos_local=eos_local, total=total, rule=rule)


def native_beam_step(logits: Tensor, *, total: Tensor, rule: StepRule) -> BeamStep:
    """`beam_step` by the compiled extension, which writes no log-probabilities but the best."""
    values, ids, eos_local = log_softmax_topk(logits, k=rule.count, column=rule.eos_id)
    return merge(values, ids=ids, eos_local=eos_local, total=total, rule=rule)


def merge(values: Tensor, *, ids: Tensor, eos_local: Tensor, total: Tensor, rule: StepRule) -> BeamStep:
    """From the best tokens of each hypothesis to the best of each source.

    Args:
        values: [B * K, C] log-probabilities of the tokens `ids` [B * K, C], best first.
        ids: int64.
        eos_local: [B * K], of the end token.
        total: [B, K], of the hypotheses so far.
        rule: what is wanted.
    """
    batch, num_hyps = total.shape
    score = total.unsqueeze(-1) + values.view(batch, num_hyps, -1)
    ids = ids.view(batch, num_hyps, -1)
    eos_local = eos_local.view(batch, num_hyps)
    eos_score = total + eos_local
    allowed = (eos_score >= score[..., 0] - rule.max_logit_delta) & (eos_local > rule.local_threshold)
    flat = score.masked_fill(ids == rule.eos_id, NEG_INF).flatten(1)
    parents = torch.arange(num_hyps, device=ids.device).repeat_interleave(ids.shape[2]).expand(batch, -1)
    tokens = ids.flatten(1)
    missing = rule.size - flat.shape[1]
    if missing > 0:
        # Fewer extensions than places: the rest of the beam stays empty.
        flat = torch.nn.functional.pad(flat, (0, missing), value=NEG_INF)
        tokens, parents = (torch.nn.functional.pad(each, (0, missing), value=0) for each in (tokens, parents))
    best = merged_topk(flat, ranks=tokens * num_hyps + parents, k=rule.size)
    going = (each.gather(1, best) for each in (flat, parents, tokens))
    return BeamStep(score, ids, eos_score, allowed, *going)
