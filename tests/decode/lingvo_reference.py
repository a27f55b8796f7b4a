"""Beam search as Lingvo defines it, for one source, with Python lists and loops: slow, plain, independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Table = Callable[[tuple[int, ...]], Sequence[float]]


@dataclass
class Settings:
    """Lingvo's options."""

    num_hyps: int
    steps: int
    eos: int = 1
    beam_size: float = 3.0
    alpha: float = 0.0
    beta: float = 0.0
    ratio: float = 1.0
    delta: float = 5.0
    local: float = -100.0
    ensure_full: bool = False
    force_top: bool = False
    force_last: bool = False
    allow_empty: bool = True


@dataclass
class Done:
    """A terminated hypothesis."""

    ids: tuple[int, ...]
    logprob: float
    score: float


def normalized(s: Settings, *, ids: tuple[int, ...], logprob: float, attention: Table | None) -> float:
    """The ranking score; `ids` without the end token."""
    score = logprob / (((len(ids) + 1) + 5) / 5) ** s.alpha
    if s.beta and attention is not None:
        rows = [attention(ids[:n]) for n in range(len(ids) + 1)]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        score += s.ratio * s.beta * sum(math.log(min(max(total / s.ratio, 0.001), 0.5)) for total in sums)
    return score


def search(table: Table, *, settings: Settings, attention: Table | None = None) -> list[Done]:
    """All terminated hypotheses of one source, best first."""
    s = settings
    active: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: list[Done] = []
    best = -math.inf
    for step in range(s.steps):
        last = step == s.steps - 1 and s.force_last
        proposals: list[tuple[float, int, int]] = []
        for hyp, (ids, total) in enumerate(active):
            row = table(ids)
            ranked = sorted(range(len(row)), key=lambda v: (-row[v], v))[: s.num_hyps + 1]
            eos_in = s.eos in ranked or s.force_top or last
            near = total + row[s.eos] >= total + row[ranked[0]] - s.delta and row[s.eos] > s.local
            if eos_in and (last or near) and (ids or s.allow_empty) and row[s.eos] > -math.inf:
                logprob = total + row[s.eos]
                done.append(Done(ids, logprob, normalized(s, ids=ids, logprob=logprob, attention=attention)))
                best = max(best, logprob)
            proposals += [(-(total + row[v]), v, hyp) for v in ranked if v != s.eos and row[v] > -math.inf]
        chosen = sorted(proposals)[: s.num_hyps]
        active = [((*active[hyp][0], v), -negative) for negative, v, hyp in chosen]
        gap = all(total <= best - s.beam_size for _, total in active)
        if gap and not (s.ensure_full and active and len(done) < s.num_hyps):
            break
    return sorted(done, key=lambda hypothesis: -hypothesis.score)
