"""What `megaseq bench kernels` proves and times of a step of beam search: beams of 4, one source to very many."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from megaseq.kernels.beam_step import StepRule, beam_step
from megaseq.kernels.beam_step.cases import SCORE_TOLERANCE
from megaseq.kernels.beam_step.configs import configs
from megaseq.kernels.beam_step.reference import reference_beam_step
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, ready


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step of 4 hypotheses of each source."""

    name: str
    batch: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    num_hyps: int = 4

    def small(self) -> Shape:
        """Sizes for a proof."""
        return dataclasses.replace(self, batch=2, vocab=2100)

    @property
    def rule(self) -> StepRule:
        """That of Lingvo's beam search."""
        return StepRule(1, self.num_hyps + 1, self.num_hyps, max_logit_delta=5.0, local_threshold=-100.0)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits [B * K, V] and totals [B, K]."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch * self.num_hyps, self.vocab)
        logits = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        return logits, torch.randn(self.batch, self.num_hyps, generator=generator, device=device)


SHAPES = tuple(
    shape
    for batch in (1, 32, 256)
    for shape in (
        Shape(f"t5_large_batch_{batch}", batch, 32128),
        Shape(f"transformer_big_fp32_batch_{batch}", batch, 32000, torch.float32),
    )
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "beam_step",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"beam_step": configs()},
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Scores beside those of the reference, and beside the reference's scores of what was chosen.

    On a GPU of full size, as tiles depend on the number of rows. Among so many scores some differ by the last bit of a
    sum alone, so that the choices themselves may be others; `proofs.py` has cases where they are the same.
    """
    shape = shape if device.type == "cuda" else shape.small()
    logits, total = shape.tensors(device)
    found = beam_step(logits, total=total, rule=shape.rule)
    expected = reference_beam_step(logits, total=total, rule=shape.rule, forbid_eos=None, normalised=False)
    scores = total.unsqueeze(-1) + logits.float().log_softmax(dim=-1).view(*total.shape, -1)
    # What is out of range would bring a GPU down; brought into it, it has a wrong score.
    ids, next_ids = (each.clamp(0, shape.vocab - 1) for each in (found.ids, found.next_ids))
    parents = found.next_parents.clamp(0, shape.num_hyps - 1)
    chosen = scores.gather(2, ids)
    next_chosen = scores.flatten(1).gather(1, parents * shape.vocab + next_ids)
    pairs = {
        "score": (found.score, expected.score),
        "score of ids": (chosen, expected.score),
        "eos_score": (found.eos_score, expected.eos_score),
        "next_score": (found.next_score, expected.next_score),
        "score of next_ids": (next_chosen, expected.next_score),
    }
    return {name: Comparison(*pair, SCORE_TOLERANCE) for name, pair in pairs.items()} | {
        "eos_allowed": Comparison(found.eos_allowed, expected.eos_allowed, 0.0),
        "range of ids": Comparison(
            torch.cat([found.ids.flatten(), found.next_ids.flatten()]),
            torch.cat([ids.flatten(), next_ids.flatten()]),
            0.0,
        ),
        "range of parents": Comparison(found.next_parents, parents, 0.0),
    }


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size; on the host of a small one."""
    shape = shape if device.type == "cuda" else shape.small()
    logits, total = shape.tensors(device)
    run = functools.partial(_ours, logits, total, shape.rule)
    peers = {"log_softmax_topk": ready(functools.partial(_torch, logits, total, shape.rule))}
    moved = logits.numel() * logits.element_size()
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.8, "log_softmax_topk": 1.0})


def _ours(logits: Tensor, total: Tensor, rule: StepRule) -> Tensor:
    return beam_step(logits, total=total, rule=rule).next_score


def _torch(logits: Tensor, total: Tensor, rule: StepRule) -> Tensor:
    """Scores of the next beam [B, E], of twice as many extensions of each source; ties as they fall."""
    scores = logits.log_softmax(dim=-1, dtype=torch.float32).view(*total.shape, -1) + total.unsqueeze(-1)
    values, places = scores.flatten(1).topk(2 * rule.size)
    going = values.masked_fill(places % logits.shape[1] == rule.eos_id, float("-inf"))
    return going.topk(rule.size).values
