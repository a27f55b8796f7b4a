"""What `megaseq bench kernels` proves of a step of beam search on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools

import torch

from megaseq.kernels.beam_step.cases import CASES, NEG_INF, SCORE_TOLERANCE, StepCase
from megaseq.kernels.beam_step.reference import reference_beam_step
from megaseq.kernels.bench.passes import in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison

IN_OTHER_TYPES = ("plain", "holes", "holes_and_ties")
"""Names of cases that are proven in bfloat16 and float16 too."""


def proof_cases() -> list[BenchCase]:
    """All calls, the vocabulary as one chunk and in three."""
    return [
        BenchCase(
            "beam_step",
            f"{case.name}_{short(dtype)}_chunks_{chunks}",
            functools.partial(compare, case, dtype=dtype, chunks=chunks),
        )
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES, first=torch.float32)
        for chunks in (1, 3)
    ]


def compare(case: StepCase, device: torch.device, *, dtype: torch.dtype, chunks: int) -> dict[str, Comparison]:
    """Every output beside the reference: choices must be the same, but for places of the next beam that are empty."""
    # Not before: it needs Triton.
    from megaseq.kernels.beam_step.launch import triton_beam_step

    call = case.call(dtype=dtype, device=device)
    found, expected = triton_beam_step(**call, num_chunks=chunks), reference_beam_step(**call)
    empty = expected.next_score == NEG_INF
    found, expected = (
        step._replace(
            next_parents=step.next_parents.masked_fill(empty, 0), next_ids=step.next_ids.masked_fill(empty, 0)
        )
        for step in (found, expected)
    )
    return {
        name: Comparison(mine, theirs, SCORE_TOLERANCE if theirs.is_floating_point() else 0.0)
        for name, mine, theirs in zip(found._fields, found, expected, strict=True)
    }
