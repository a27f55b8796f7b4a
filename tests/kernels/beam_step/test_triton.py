"""Triton's step of beam search against the reference: the same choices, ties and all."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from megaseq.kernels import triton_runtime
from megaseq.kernels.beam_step import BeamStep, StepRule, beam_step
from megaseq.kernels.beam_step.cases import CASES, StepCase
from megaseq.kernels.beam_step.reference import reference_beam_step
from megaseq.kernels.checks import KernelError
from megaseq.kernels.triton_runtime import Config

from .test_beam_step import check_same

pytestmark = pytest.mark.skipif(not triton_runtime.installed(), reason="Triton is not installed")
BY_NAME = {case.name: case for case in CASES}


def run(call: dict[str, object], *, num_chunks: int | None = None, block: int = 512) -> BeamStep:
    """The launcher itself; on a GPU or under the interpreter."""
    from megaseq.kernels.beam_step.launch import triton_beam_step

    with triton_runtime.override(beam_step=Config({"BLOCK": block})):
        return triton_beam_step(**call, num_chunks=num_chunks)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_equals_the_reference(case: StepCase, num_chunks: int, device: torch.device) -> None:
    """In one chunk of several tiles, and in chunks of which the last is shorter."""
    call = case.call(dtype=torch.float32, device=device)
    check_same(run(call, num_chunks=num_chunks), reference_beam_step(**call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "holes", "holes_and_ties"])
def test_half_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    call = BY_NAME[name].call(dtype=dtype, device=device)
    check_same(run(call, num_chunks=2), reference_beam_step(**call))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(2, 300), num_hyps=st.integers(1, 5), count=st.integers(1, 9),
    size=st.integers(1, 6), distinct=st.sampled_from([1, 2, 9, 10**6]), flags=st.tuples(*[st.booleans()] * 3),
)  # fmt: skip
def test_any_shape(
    device: torch.device, seed: int, vocab: int, num_hyps: int, count: int, size: int, distinct: int,
    flags: tuple[bool, bool, bool],
) -> None:  # fmt: skip
    """Vocabularies that no tile divides, more places than tokens, few values and many."""
    holes, forbidden, normalised = flags
    case = StepCase("any", 2, num_hyps, vocab, count, size, distinct, holes, forbidden, normalised)
    call = case.call(dtype=torch.float32, device=device, seed=seed)
    check_same(run(call, num_chunks=3, block=64), reference_beam_step(**call))


def test_what_rounding_makes_equal(device: torch.device) -> None:
    """Logits that differ less than the rounding of their log-probabilities: the lower id wins, in any chunk."""
    logits = torch.full((2, 400), -3.0, device=device)
    logits[:, 0] = 20.0
    # In each run of 50, the later, the better; the log-probabilities of all of them are the same.
    step = torch.arange(50, device=device) * 1e-9
    logits[:, 100:150] = step
    logits[1, 250:300] = 2 * step
    call = {
        "logits": logits, "total": torch.zeros(1, 2, device=device), "forbid_eos": None, "normalised": False,
        "rule": StepRule(1, 4, 3, 5.0, -100.0),
    }  # fmt: skip
    wanted = reference_beam_step(**call)  # type: ignore[arg-type]
    assert logits[0].unique().numel() > 50 and wanted.ids[0].tolist() == [[0, 100, 101, 102]] * 2
    for num_chunks in (1, 7):
        check_same(run(call, num_chunks=num_chunks, block=64), wanted)


def test_zeros_of_both_signs_are_equal(device: torch.device) -> None:
    """The lower id is the better one, whatever its sign."""
    scores = torch.full((1, 70), -5.0, device=device)
    scores[0, 3], scores[0, 5] = -0.0, 0.0
    call = {
        "logits": scores, "total": torch.zeros(1, 1, device=device), "forbid_eos": None, "normalised": True,
        "rule": StepRule(1, 2, 2, 5.0, -100.0),
    }  # fmt: skip
    step = run(call, num_chunks=2, block=64)
    assert step.ids[0].tolist() == [[3, 5]] and step.next_ids.tolist() == [[3, 5]]


def test_nan_shows(device: torch.device) -> None:
    """NaN of both signs or infinity anywhere in a row makes its scores NaN, and its ids stay tokens."""
    call = BY_NAME["plain"].call(dtype=torch.float32, device=device)
    call["logits"][1, 900], call["logits"][2, 70], call["logits"][5, 3] = float("nan"), -float("nan"), float("inf")
    step = run(call, num_chunks=2)
    assert step.score.isnan().all(-1).tolist() == [[False, True, True], [False, False, True]]
    assert step.eos_score.isnan().tolist() == step.score.isnan().all(-1).tolist()
    for ids in (step.ids, step.next_ids):
        assert bool(((ids >= 0) & (ids < 1700)).all())
    call = BY_NAME["normalised"].call(dtype=torch.float32, device=device)
    call["logits"][0, 900] = float("nan")
    assert run(call, num_chunks=2).score.isnan().all(-1).sum() == 1


def test_strides(device: torch.device) -> None:
    """Columns of a wider tensor; totals and flags that are not neighbours."""
    call = BY_NAME["holes_and_ties"].call(dtype=torch.float32, device=device)
    wide = torch.full((6, 1700, 3), float("nan"), device=device)
    wide[..., 1] = call["logits"]
    totals = call["total"].t().contiguous().t()
    flags = torch.stack([call["forbid_eos"], ~call["forbid_eos"]], dim=1)
    changed = call | {"logits": wide[..., 1], "total": totals, "forbid_eos": flags[:, 0]}
    check_same(run(changed, num_chunks=2), reference_beam_step(**call))


def test_offsets_beyond_int32(device: torch.device) -> None:
    """Rows further apart than 2 ** 31 elements; most of the memory is never touched."""
    if device.type != "cpu":
        pytest.skip("a GPU gives all memory at once")
    np = pytest.importorskip("numpy")
    call = StepCase("far", batch=1, num_hyps=3, vocab=700).call(dtype=torch.bfloat16)
    step = (1 << 30) + 8
    # NumPy's, as torch's new memory is poisoned here, all of it.
    apart = torch.from_numpy(np.empty(2 * step + 700, dtype=np.int16)).view(torch.bfloat16)
    view = apart.as_strided((3, 700), (step, 1))
    view.copy_(call["logits"])
    check_same(run(call | {"logits": view}, num_chunks=2), reference_beam_step(**call))


def test_dispatch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it runs, and refuses what it cannot do."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "beam_step=triton")
    call = BY_NAME["plain"].call(dtype=torch.float32, device=device)
    check_same(beam_step(**call), reference_beam_step(**call))
    with pytest.raises(KernelError, match="its kernels take float32, bfloat16 and float16"):
        beam_step(**call | {"logits": call["logits"].double()})
    with pytest.raises(KernelError, match="up to 32 hypotheses"):
        beam_step(**StepCase("wide", num_hyps=33, vocab=9).call(dtype=torch.float32, device=device))
    none = call | {"logits": call["logits"][:0], "total": call["total"][:0]}
    assert beam_step(**none).next_ids.shape == (0, 3)
