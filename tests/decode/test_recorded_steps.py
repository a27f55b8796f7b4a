"""Steps done again from a recording find what steps done by Python find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base.errors import ParamsError
from megaseq.decode import BeamSearch, DecodeError, Hypothesis, NoRepeatNgrams, beam_search, recorded_steps
from megaseq.decode.device_loop import DeviceLoop
from tests.layers.test_packing import CHANGES, make, model_of

from .recording import Captures
from .table_decoder import TableDecoder, sources
from .test_device_loop import chain_params, check_equal


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder keeps its caches as on a GPU; the ops are such as can be seen."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "beam_step=reference,decode_attention=reference")


def recorded(
    model: Any, *, source: Any, p: BeamSearch.Params, captures: Captures, prefix: torch.Tensor | None = None
) -> list[list[Hypothesis]]:
    """What the search finds with its steps recorded."""
    search: BeamSearch = p.instantiate()
    start = search.start(model, source=source)
    loop = DeviceLoop(
        search._rules, constraints=search._constraints, steps_between_looks=p.device_loop_steps, capture=captures
    )
    num_steps = int(start.limits.most.max())
    with torch.no_grad():
        return loop.search(model, start=start, num_steps=num_steps, prefix=prefix).hypotheses(num_best=p.num_best)


def some_sources(count: int) -> Any:
    """Sources of several lengths."""
    source = sources(count)
    source.ids.clamp_(min=4)
    for row in range(count):
        source.segment_ids[row, 4 - row % 3 :] = 0
        source.ids[row] += row
    return source


@pytest.mark.parametrize("name", sorted(CHANGES))
@pytest.mark.parametrize("covered", [False, True])
def test_finds_the_same(name: str, covered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every kind of positions and attention; the caches grow twice, and some sources leave."""
    monkeypatch.setattr(recorded_steps, "FIRST_ROOM", 4)
    model, source = model_of(name), some_sources(5)
    p = chain_params(
        coverage_penalty=0.3 if covered else 0.0, beam_size=1.0, target_seq_len=14, max_length_ratio=3.0,
        max_length_offset=2,
    )  # fmt: skip
    captures = Captures()
    found = recorded(model, source=source, p=p, captures=captures)
    check_equal(found, beam_search(model, source=source, params=p.replace(device_loop=False)))
    assert captures.recorded >= 2 and captures.replayed >= 4


def test_few_steps_are_done_by_python() -> None:
    """One for each recording, and the first."""
    captures, model = Captures(), model_of("t5-shared")
    p = chain_params(target_seq_len=60, beam_size=1e9, termination="never", coverage_penalty=0.0, min_seq_len=40)
    recorded(model, source=some_sources(2), p=p, captures=captures)
    # Room for 32, then for 60 tokens: two recordings, each after a step by Python, and the first step before.
    assert captures.recorded == 2 and captures.replayed == 60 - 2 - 1


def test_steps_of_a_prefix_are_done_by_python() -> None:
    model, source = model_of("sinusoidal"), some_sources(3)
    p = chain_params(coverage_penalty=0.0, target_seq_len=8, beam_size=1e9, min_seq_len=6)
    prefix = torch.tensor([[5, 6, 7], [8, -1, 9], [-1, -1, 4]])
    captures = Captures()
    found = recorded(model, source=source, p=p, captures=captures, prefix=prefix)
    check_equal(found, beam_search(model, source=source, params=p.replace(device_loop=False), prefix=prefix))
    assert captures.recorded == 1 and captures.replayed == 8 - 3 - 1


def test_sources_leave_by_halves() -> None:
    """A recording for each number of sources, of which there are few."""
    model, source = model_of("rotary"), some_sources(8)
    p = chain_params(
        coverage_penalty=0.0, target_seq_len=24, beam_size=1e9, min_seq_len=0, device_loop_steps=1,
        max_length_ratio=3.0,
    )  # fmt: skip
    source.segment_ids[:, 1:] = 0
    for row in range(8):
        source.segment_ids[row, : 1 + row % 4] = 1
    captures = Captures()
    found = recorded(model, source=source, p=p, captures=captures)
    check_equal(found, beam_search(model, source=source, params=p.replace(device_loop=False)))
    assert 2 <= captures.recorded <= 4


def test_no_position_is_left() -> None:
    """As without a recording: at the step that needs it, and not before."""
    model, source = make("learned"), some_sources(2)
    p = chain_params(coverage_penalty=0.0, target_seq_len=40, beam_size=1e9, termination="never", min_seq_len=30)
    captures = Captures()
    with pytest.raises(ParamsError, match=r"max_positions: must cover the longest sequence, but is 16. Raise it to 17"):
        recorded(model, source=source, p=p, captures=captures)
    assert captures.replayed == 14
    found = recorded(model, source=source, p=p.replace(target_seq_len=16, min_seq_len=3), captures=Captures())
    p = p.replace(target_seq_len=16, min_seq_len=3, device_loop=False)
    check_equal(found, beam_search(model, source=source, params=p))


def test_what_a_graph_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source, p = some_sources(2), chain_params(coverage_penalty=0.0, device_loop_graph=True)
    with pytest.raises(DecodeError, match="device_loop_graph: must be False where there is no GPU"):
        beam_search(model_of("alibi"), source=source, params=p)
    with pytest.raises(DecodeError, match="device_loop_graph: must be False where the loop does not stay on"):
        beam_search(model_of("alibi"), source=source, params=p.replace(device_loop=None))
    with pytest.raises(DecodeError, match="must meet a decoder that has `fix`, but TableDecoder has none"):
        recorded(TableDecoder(lambda source, ids: [0.0] * 5), source=sources(2), p=p, captures=Captures())
    monkeypatch.setenv("MEGASEQ_KERNELS", "decode_attention=native")
    with pytest.raises(ParamsError, match="fix: must meet a decoder in evaluation whose attention is run by"):
        recorded(model_of("alibi"), source=source, p=p, captures=Captures())
    problems = [str(problem) for problem in p.replace(processors=(NoRepeatNgrams.Params(size=2),)).check()]
    assert any("must be False with processors" in problem for problem in problems)


def test_the_recorder_sees_what_waits() -> None:
    values = torch.ones(3)
    for wait in (lambda: values.sum().item(), lambda: values.nonzero(), lambda: torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            Captures()(wait)


def test_the_recorder_changes_nothing_but_in_a_replay() -> None:
    total, step = torch.zeros(2), torch.zeros(1, dtype=torch.long)

    def body() -> None:
        total.add_(step + 1)
        step.add_(1)

    replay = Captures()(body)
    assert not total.any() and not step.any()
    replay()
    replay()
    assert total.tolist() == [3.0, 3.0] and step.tolist() == [2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", ["t5-shared", "learned", "rotary"])
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, with the kernels."""
    monkeypatch.delenv("MEGASEQ_KERNELS")
    model, source = make(name).cuda(), some_sources(5).transform(torch.Tensor.cuda)
    p = chain_params(coverage_penalty=0.0, beam_size=2.0, target_seq_len=14)
    found = beam_search(model, source=source, params=p.replace(device_loop_graph=True))
    check_equal(found, beam_search(model, source=source, params=p.replace(device_loop=False)))
