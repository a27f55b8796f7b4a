"""The calls of beam_step that tests prove and benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.beam_step import configs
from megaseq.kernels.beam_step.rule import StepRule
from megaseq.kernels.compile_case import CompileCase

NEG_INF = float("-inf")


@dataclass(frozen=True)
class StepCase:
    """Sizes and kind of one call."""

    name: str
    batch: int = 2
    num_hyps: int = 3
    vocab: int = 1700
    count: int = 4
    size: int = 3
    distinct: int | None = None
    """Values that logits have; None: as many as there are."""
    holes: bool = False
    """A third of a row, a whole row and the end token are impossible; a hypothesis is absent."""
    forbidden: bool = False
    """Some sources may not end."""
    normalised: bool = False

    def call(self, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of `beam_step`, `logits` among them; the same numbers on any device."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.batch * self.num_hyps
        logits = torch.randn(rows, self.vocab, generator=generator) * 3
        if self.distinct is not None:
            logits = torch.randint(self.distinct, (rows, self.vocab), generator=generator).float()
        total = torch.randint(3, (self.batch, self.num_hyps), generator=generator).float() / 4 - 1
        if self.holes:
            logits[0, torch.randint(self.vocab, (self.vocab // 3,), generator=generator)] = NEG_INF
            logits[-1], logits[rows // 2, 1] = NEG_INF, NEG_INF
            total[-1, -1] = NEG_INF
        if self.normalised:
            scores = logits.log_softmax(dim=-1)
            logits = scores.masked_fill(scores.isnan(), NEG_INF)
        early = torch.arange(self.batch) % 2 == 0
        return {
            "logits": logits.to(device, dtype),
            "total": total.to(device),
            "rule": StepRule(1, self.count, self.size, max_logit_delta=4.0, local_threshold=-8.5),
            "forbid_eos": early.to(device) if self.forbidden else None,
            "normalised": self.normalised,
        }


CASES = (
    StepCase("plain"),
    StepCase("first_step", num_hyps=1, size=4, count=5),
    StepCase("two_of_each", num_hyps=5, count=10, size=5, batch=1),
    StepCase("ties", distinct=2),
    StepCase("some_ties", distinct=40, num_hyps=4, count=5, size=4),
    StepCase("all_equal", distinct=1),
    StepCase("holes", holes=True, batch=3),
    StepCase("holes_and_ties", holes=True, distinct=5, count=8, forbidden=True),
    StepCase("forbidden", forbidden=True),
    StepCase("normalised", normalised=True, holes=True, forbidden=True),
    StepCase("more_places_than_tokens", vocab=3, num_hyps=2, count=4, size=9),
    StepCase("one_hypothesis", batch=1, num_hyps=1, count=2, size=1, vocab=2100),
)
SCORE_TOLERANCE = 1e-5
"""Largest difference of a score from the reference."""


def compile_cases() -> list[CompileCase]:
    """Launches of both kernels, and with every tile that may be chosen."""
    cases = []
    for num_hyps, count, dtype in ((4, 5, torch.bfloat16), (4, 8, torch.float32), (8, 9, torch.float16)):
        shape = {"batch": 1, "vocab": 32128, "num_hyps": num_hyps, "count": count, "size": num_hyps}
        for config in configs.configs() if num_hyps == 4 else [configs.DEFAULT]:
            cases.append(_launch(StepCase("logits", **shape), dtype=dtype, config=config))  # type: ignore[arg-type]
        other = StepCase("log_probabilities", normalised=True, forbidden=True, **shape)  # type: ignore[arg-type]
        cases.append(_launch(other, dtype=torch.float32, config=configs.DEFAULT))
    first = StepCase("first_step", batch=1, num_hyps=1, count=5, size=4, vocab=32128)
    widest = StepCase("widest", batch=1, num_hyps=32, count=64, size=32, vocab=32128)
    return [*cases, *(_launch(case, dtype=torch.float32, config=configs.DEFAULT) for case in (first, widest))]


def _launch(case: StepCase, *, dtype: torch.dtype, config: triton_runtime.Config) -> CompileCase:
    def run() -> None:
        from megaseq.kernels.beam_step.launch import triton_beam_step

        with triton_runtime.override(beam_step=config):
            triton_beam_step(**case.call(dtype=dtype), num_chunks=64)

    kind = str(dtype).removeprefix("torch.")
    name = f"{case.name}-{kind}-k{case.num_hyps}-c{case.count}-b{config.blocks['BLOCK']}-w{config.num_warps}"
    # The widest merge takes a few registers more with Triton 3.6.
    budget = SPILL_BYTES if triton_runtime.version() >= (3, 9) else SPILL_BYTES + 16
    return CompileCase(name, run, spill_bytes=budget)


SPILL_BYTES = 64
"""Bytes that a thread of the merging program may spill, which runs once a source."""
