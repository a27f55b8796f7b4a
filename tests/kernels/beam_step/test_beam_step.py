"""A step of beam search: the reference against sorting in float64, the host's path, refusals, the op in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.beam_step import BeamStep, StepRule, beam_step, op
from megaseq.kernels.beam_step.cases import CASES, NEG_INF, SCORE_TOLERANCE, StepCase
from megaseq.kernels.beam_step.reference import reference_beam_step
from megaseq.kernels.checks import KernelError

BY_NAME = {case.name: case for case in CASES}


def check_same(got: BeamStep, wanted: BeamStep) -> None:
    """Every choice is the same; scores are close. Empty places of the next beam may hold any choice that there is."""
    empty = wanted.next_score == NEG_INF
    assert torch.equal(got.next_score == NEG_INF, empty)
    num_hyps = wanted.score.shape[1]
    assert bool(((got.next_parents >= 0) & (got.next_parents < num_hyps) & (got.next_ids >= 0)).all())
    got, wanted = (
        each._replace(
            next_parents=each.next_parents.masked_fill(empty, 0), next_ids=each.next_ids.masked_fill(empty, 0)
        )
        for each in (got, wanted)
    )
    for name, mine, theirs in zip(BeamStep._fields, got, wanted, strict=True):
        assert mine.dtype is theirs.dtype, name
        if mine.dtype.is_floating_point:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=SCORE_TOLERANCE, equal_nan=True, msg=name)
        else:
            assert torch.equal(mine, theirs), name


def by_sorting(call: dict[str, Any]) -> BeamStep:
    """The same in Python: lists, sorted by what the docstring says, of float32 numbers."""
    rule: StepRule = call["rule"]
    logits, total = call["logits"].float(), call["total"]
    (batch, num_hyps), vocab = total.shape, logits.shape[1]
    values = logits if call["normalised"] else logits.log_softmax(dim=-1)
    if not call["normalised"]:
        values = torch.where((logits == NEG_INF).all(-1, keepdim=True), NEG_INF, values)
    values = values.view(batch, num_hyps, vocab)
    if call["forbid_eos"] is not None:
        values[..., rule.eos_id].masked_fill_(call["forbid_eos"][:, None], NEG_INF)
    rows: list[list[Tensor]] = [[] for _ in BeamStep._fields]
    for b in range(batch):
        score, ids, going = [], [], []
        for k in range(num_hyps):
            line = values[b, k].tolist()
            best = sorted(range(vocab), key=lambda v: (-line[v], v))[: rule.count]
            ids.append(best)
            score.append((total[b, k] + values[b, k, best]).tolist())
            going += [(-s, v, k) for s, v in zip(score[-1], best, strict=True) if v != rule.eos_id]
        chosen = sorted(going)[: rule.size]
        chosen += [(-NEG_INF, 0, 0)] * (rule.size - len(chosen))
        eos_local = values[b, :, rule.eos_id]
        eos = total[b] + eos_local
        top = torch.tensor(score)[:, 0]
        rows[0].append(torch.tensor(score))
        rows[1].append(torch.tensor(ids))
        rows[2].append(eos)
        rows[3].append((eos >= top - rule.max_logit_delta) & (eos_local > rule.local_threshold))
        rows[4].append(torch.tensor([-s for s, _, _ in chosen]))
        rows[5].append(torch.tensor([k for _, _, k in chosen]))
        rows[6].append(torch.tensor([v for _, v, _ in chosen]))
    return BeamStep(*(torch.stack(row) for row in rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_a_sort(case: StepCase) -> None:
    call = case.call(dtype=torch.float32)
    got, wanted = reference_beam_step(**call), by_sorting(call)
    check_same(got, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_reference(case: StepCase, dtype: torch.dtype) -> None:
    """Whatever runs on this device by itself."""
    call = case.call(dtype=dtype)
    check_same(beam_step(**call), reference_beam_step(**call))


def test_the_host_takes_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the C++ extension is not built")
    monkeypatch.setenv("MEGASEQ_KERNELS", "beam_step=native")
    call = BY_NAME["holes"].call(dtype=torch.float32)
    check_same(beam_step(**call), reference_beam_step(**call))
    for name in ("forbidden", "normalised"):
        with pytest.raises(KernelError, match="logits that nothing forbids"):
            beam_step(**BY_NAME[name].call(dtype=torch.float32))
    with pytest.raises(KernelError, match="takes float32 in host memory"):
        beam_step(**call | {"logits": call["logits"].bfloat16()})


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_nan_shows(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN or infinity anywhere in a row makes its scores NaN, and its ids stay tokens."""
    if implementation == "native" and not native.available():
        pytest.skip("the C++ extension is not built")
    monkeypatch.setenv("MEGASEQ_KERNELS", f"beam_step={implementation}")
    call = BY_NAME["plain"].call(dtype=torch.float32)
    call["logits"][1, 900], call["logits"][5, 3] = float("nan"), float("inf")
    step = beam_step(**call)
    assert step.score.isnan().all(-1).tolist() == [[False, True, False], [False, False, True]]
    assert step.eos_score.isnan().tolist() == step.score.isnan().all(-1).tolist()
    for ids in (step.ids, step.next_ids):
        assert bool(((ids >= 0) & (ids < 1700)).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6, 1700, dtype=torch.long)}, "logits must be floating point"),
        ({"logits": torch.zeros(5, 1700)}, r"logits must have shape \[B \* K, V\]"),
        ({"total": torch.zeros(6)}, r"total must have shape \[B, K\]"),
        ({"total": torch.zeros(2, 3, dtype=torch.float64)}, "total must be float32"),
        ({"forbid_eos": torch.zeros(3, dtype=torch.bool)}, r"forbid_eos must have shape \[B\]"),
        ({"forbid_eos": torch.zeros(2)}, "forbid_eos must be bool"),
        ({"rule": StepRule(1700, 4, 3, 5.0, -9.0)}, "rule.eos_id must be a token of the 1700 there are"),
        ({"rule": StepRule(1, 0, 3, 5.0, -9.0)}, "rule must have count, size and K of 1 or more"),
        ({"logits": torch.zeros(6, 1700, requires_grad=True)}, "must not be asked for a gradient"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"beam_step: {message}"):
        beam_step(**BY_NAME["plain"].call(dtype=torch.float32) | change)


class _Step(torch.nn.Module):
    """One call in a module, for export."""

    def forward(self, logits: Tensor, total: Tensor, forbid: Tensor) -> tuple[Tensor, ...]:
        """A step."""
        rule = StepRule(1, 4, 3, 4.0, -8.5)
        return tuple(beam_step(logits * 2, total=total, rule=rule, forbid_eos=forbid))


def test_the_op_is_traced_compiled_and_exported() -> None:
    call = BY_NAME["forbidden"].call(dtype=torch.float32)
    tensors = (call["logits"], call["total"], call["forbid_eos"])
    torch.library.opcheck(torch.ops.megaseq.beam_step.default, (*tensors, 1, 4, 3, 4.0, -8.5, False))
    wanted = _Step()(*tensors)
    compiled = torch.compile(_Step(), backend="aot_eager", fullgraph=True)
    check_same(BeamStep(*compiled(*tensors)), BeamStep(*wanted))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(_Step(), tensors, dynamic_shapes=({0: 3 * batch}, {0: batch}, {0: batch}))
    more = tuple(torch.cat([tensor, tensor]) for tensor in tensors)
    got = BeamStep(*program.module()(*more))
    check_same(got, BeamStep(*(torch.cat([each, each]) for each in wanted)))


def test_the_op_in_a_graph_refuses_a_gradient() -> None:
    call = BY_NAME["plain"].call(dtype=torch.float32)
    call["logits"].requires_grad_()
    with pytest.raises(KernelError, match="must not be asked for a gradient"):
        op.traced(**call).score.sum().backward()
