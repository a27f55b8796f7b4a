"""The benchmarks of all ops: named once, right on the host, and beside peers that compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench.proof import forced, prove
from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.catalogue import FIRST, bench_cases, ops_with_kernels, proof_cases

pytest.importorskip("triton")

HOST = torch.device("cpu")
CASES = [case for cases in bench_cases().values() for case in cases]
PROOFS = [case for cases in proof_cases().values() for case in cases]
RANDOM = {("dropout", "torch")}
"""Peers that do the same to other elements."""


def identity(case: BenchCase) -> str:
    return f"{case.op}-{case.name}"


def first_cases(cases: list[BenchCase] = CASES) -> list[BenchCase]:
    """One of each op."""
    return list({case.op: case for case in reversed(cases)}.values())


def tensors(results: object) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [r for r in results if isinstance(r, Tensor)]  # type: ignore


def test_every_op_with_kernels_has_cases() -> None:
    assert {case.op for case in CASES} == set(ops_with_kernels()) == {case.op for case in PROOFS}


def test_the_most_important_ops_come_first() -> None:
    for found in (bench_cases(), proof_cases()):
        assert tuple(found)[: len(FIRST)] == FIRST


def test_names_are_unique() -> None:
    names = [identity(case) for case in CASES + PROOFS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", first_cases(PROOFS), ids=identity)
def test_calls_of_the_tests_are_proven(case: BenchCase, device: torch.device) -> None:
    assert prove(case, device=device) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", PROOFS, ids=identity)
def test_all_calls_of_the_tests_are_proven(case: BenchCase, device: torch.device) -> None:
    # Triton's interpreter rounds to e4m3 by rules of its own, and the watch over it corrects that.
    assert case.prepare is None
    assert prove(case, device=device) == []


@pytest.mark.parametrize("case", first_cases(), ids=identity)
def test_kernels_are_proven(case: BenchCase, device: torch.device) -> None:
    assert prove(case, device=device) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_all_kernels_are_proven(case: BenchCase, device: torch.device) -> None:
    assert prove(case, device=device) == []


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "attention"], ids=identity)
def test_what_is_timed_runs_and_peers_give_the_same(case: BenchCase, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU tensors are large")
    assert case.prepare is not None
    timed = case.prepare(HOST)
    assert timed.flops + timed.bytes > 0
    assert {goal.partition(":")[0] for goal in timed.goals} <= {*timed.peers, "ceiling"}
    with forced(case.op):
        expected = tensors(timed.run())
    assert expected
    for name, make in timed.peers.items():
        found = tensors(make()())
        assert len(found) == len(expected)
        for ours, theirs in zip(expected, found, strict=True):
            assert ours.shape == theirs.shape
            if (case.op, name) not in RANDOM:
                scale = max(1.0, float(ours.detach().double().abs().max()))
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize("case", [case for case in first_cases() if case.candidates], ids=identity)
def test_candidates_are_tile_sizes_that_the_kernels_ask_for(case: BenchCase, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU tensors are large")
    assert case.prepare is not None
    run = case.prepare(HOST).run if case.op != "attention" else lambda: case.check(HOST)
    with forced(case.op), triton_runtime.observed() as asked:
        run()
    assert {kernel for kernel, _ in asked} & case.candidates.keys()
    assert all(len(candidates) for candidates in case.candidates.values())
