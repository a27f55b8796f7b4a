"""The loop that stays on the device finds what the other loop finds, and does not wait for the host in between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from megaseq.base import NestedMap
from megaseq.decode import (
    BeamSearch,
    DecodeError,
    ForcedBos,
    ForcedEos,
    Hypothesis,
    NoRepeatNgrams,
    RepetitionPenalty,
    beam_search,
    device_loop,
)
from megaseq.decode.device_loop import DeviceLoop, LoopState
from megaseq.decode.finished import Finished
from tests.kernels.interpreter import needs_kernels
from tests.layers.test_packing import model_of

from .table_decoder import EOS, SOS, TableDecoder, sources
from .test_beam_search import Table, log, random_attention, random_table

PROCESSORS = (
    (),
    (NoRepeatNgrams.Params(size=2),),
    (ForcedBos.Params(token_id=2), ForcedEos.Params(), RepetitionPenalty.Params(penalty=1.3)),
)


def both(
    table: Table, *, count: int, attention: Table | None = None, prefix: torch.Tensor | None = None, **options: Any
) -> tuple[list[list[Hypothesis]], list[list[Hypothesis]]]:
    """What either loop finds; sources of different lengths."""
    source = sources(count)
    for row in range(count):
        source.segment_ids[row, 4 - row % 3 :] = 0
    found = []
    for on_device in (True, False):
        p = BeamSearch.Params(target_sos_id=SOS, target_eos_id=EOS, device_loop=on_device, **options)
        found.append(beam_search(TableDecoder(table, attention), source=source, params=p, prefix=prefix))
    return found[0], found[1]


def check_equal(mine: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> None:
    """The same hypotheses in the same order."""
    assert [[(hyp.ids, hyp.ended) for hyp in hyps] for hyps in mine] == [
        [(hyp.ids, hyp.ended) for hyp in hyps] for hyps in theirs
    ]
    for hyps, wanted in zip(mine, theirs, strict=True):
        assert [hyp.score for hyp in hyps] == pytest.approx([hyp.score for hyp in wanted], abs=1e-5)
        assert [hyp.logprob for hyp in hyps] == pytest.approx([hyp.logprob for hyp in wanted], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(3, 9),
    count=st.integers(1, 4),
    flags=st.tuples(*[st.booleans()] * 5),
    processors=st.sampled_from(PROCESSORS),
    prefix=st.none() | st.lists(st.integers(-1, 2), min_size=4, max_size=8),
    options=st.fixed_dictionaries(
        {
            "num_hyps_per_beam": st.integers(1, 5),
            "num_best": st.sampled_from([1, 3, 20]),
            "target_seq_len": st.integers(1, 7),
            "max_length_ratio": st.sampled_from([0.0, 1.3]),
            "min_seq_len": st.just(0),
            "min_length_ratio": st.sampled_from([0.0, 0.5]),
            "beam_size": st.sampled_from([0.3, 1.0, 3.0, 100.0]),
            "length_normalization": st.sampled_from([0.0, 0.6]),
            "coverage_penalty": st.sampled_from([0.0, 0.3]),
            "target_seq_length_ratio": st.sampled_from([1.0, 1.7]),
            "valid_eos_max_logit_delta": st.sampled_from([0.5, 2.0, 5.0]),
            "local_eos_threshold": st.sampled_from([-1.5, -100.0]),
            "candidates": st.sampled_from(["per_hyp", "merged"]),
            "termination": st.sampled_from(["score_gap", "full_beam", "heuristic", "never"]),
            "device_loop_steps": st.integers(1, 8),
        }
    ),
)
def test_equals_the_other_loop(
    seed: int, vocab: int, count: int, flags: tuple[bool, ...], processors: Any, prefix: list[int] | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """For every mix of options."""
    independent, ensure_full, force_top, force_last, allow_empty = flags
    forced = None
    if prefix is not None:
        # Tokens 0 and 2; the end token would end all of a source.
        forced = torch.tensor((prefix * 2)[: 2 * count]).view(count, 2).mul(2).clamp(min=-1, max=2)
    mine, theirs = both(
        random_table(seed, vocab=vocab), count=count, attention=random_attention(seed, length=4), prefix=forced,
        processors=processors, terminate_beams_independently=independent, ensure_full_beam=ensure_full,
        force_eos_in_top_k=force_top, force_eos_in_last_step=force_last, allow_empty_terminated_hyp=allow_empty,
        **options | {"min_seq_len": min(seed % 3, options["target_seq_len"] - 1)},
    )  # fmt: skip
    check_equal(mine, theirs)


def test_unfinished_hypotheses_and_ties() -> None:
    """What runs into the limit is kept; equals fall as they do in the other loop."""
    check_equal(
        *both(
            random_table(5, vocab=6), count=3, num_hyps_per_beam=3, num_best=9, target_seq_len=4, beam_size=9.0,
            force_eos_in_last_step=False, keep_unfinished=True,
        )
    )  # fmt: skip
    flat: Table = lambda source, ids: [0.0] * 9  # noqa: E731
    check_equal(*both(flat, count=2, num_hyps_per_beam=3, num_best=50, target_seq_len=4, beam_size=1e9))
    dead: Table = lambda source, ids: [-float("inf")] * 4 if source else log(0.0, 0.5, 0.5, 0.0)  # noqa: E731
    check_equal(*both(dead, count=3, num_hyps_per_beam=2, num_best=5, target_seq_len=3))


def test_done_sources_leave_at_a_look() -> None:
    """Source 0 ends at once, source 1 late: every 2 steps the host looks."""

    def table(source: int, ids: tuple[int, ...]) -> list[float]:
        ends = source == 0 or len(ids) == 4
        return log(0.0, 0.9, 0.06, 0.04) if ends else log(0.0, 0.0, 0.9, 0.1)

    decoder = TableDecoder(table)
    p = BeamSearch.Params(
        target_sos_id=SOS, target_eos_id=EOS, num_hyps_per_beam=2, target_seq_len=99, beam_size=1.0, device_loop=True,
        device_loop_steps=2,
    )  # fmt: skip
    found = beam_search(decoder, source=sources(2), params=p)
    assert decoder.rows_per_step == [2, 4, 2, 2, 2, 2]
    check_equal(found, beam_search(TableDecoder(table), source=sources(2), params=p.replace(device_loop=False)))


def test_nan_is_reported_with_its_step() -> None:
    """At the next look; NaN of a source that is done is nobody's business."""

    def table(source: int, ids: tuple[int, ...]) -> list[float]:
        if source == 0:
            return log(0.0, 0.9, 0.06, 0.04) if len(ids) < 2 else [float("nan")] * 4
        return log(0.0, 0.1, 0.5, 0.4)

    p = BeamSearch.Params(
        target_sos_id=SOS, target_eos_id=EOS, num_hyps_per_beam=2, target_seq_len=6, beam_size=1.0, device_loop=True
    )
    assert beam_search(TableDecoder(table), source=sources(2), params=p)[0][0].ids == ()
    with pytest.raises(DecodeError, match="logits: must hold no NaN, but do at step 2"):
        beam_search(TableDecoder(table), source=sources(2), params=p.replace(beam_size=1e9))


def test_end_token_outside_the_vocabulary() -> None:
    p = BeamSearch.Params(target_eos_id=7, device_loop=True)
    with pytest.raises(DecodeError, match="target_eos_id: must be below the vocabulary's 3, but is 7"):
        beam_search(TableDecoder(lambda source, ids: [0.0] * 3), source=sources(1), params=p)


class Waits(TorchDispatchMode):
    """Raises when the host would wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what reads nothing back."""
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if by_mask or name in self.NAMES:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is read back while it is open, but in a look."""
    stock_look, stock_list = device_loop._look, torch.Tensor.tolist

    def look(loop: LoopState) -> list[int]:
        with torch.utils._python_dispatch._disable_current_modes(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", stock_list)
            return stock_look(loop)

    def refuse(*_: Any) -> None:
        raise AssertionError("tolist waits for the device")

    with Waits(), monkeypatch.context() as patch:
        patch.setattr(device_loop, "_look", look)
        patch.setattr(torch.Tensor, "tolist", refuse)
        yield


class ChainDecoder:
    """Logits depend on the source and the last token; nothing but tensors."""

    def __init__(self, *, num_sources: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(num_sources, vocab, vocab, generator=generator) * 2

    def prefill(self, source: NestedMap) -> NestedMap:
        """The rows that are left."""
        return NestedMap(rows=source.ids[:, 0])

    def step(
        self, state: NestedMap, *, tokens: torch.Tensor, need_attention: bool = False
    ) -> tuple[torch.Tensor, NestedMap]:
        """Looks up."""
        rows = state.rows
        num_hyps = tokens.shape[0] // rows.shape[0]
        logits = self.table[rows.repeat_interleave(num_hyps), tokens]
        return logits, NestedMap(rows=rows, attention_probs=torch.full((tokens.shape[0], 4), 0.25))

    def select(self, state: NestedMap, *, sources: torch.Tensor, hyps: torch.Tensor) -> NestedMap:
        """Drops sources."""
        return NestedMap(rows=state.rows[sources])

    def reorder(self, state: NestedMap, *, hyps: torch.Tensor) -> NestedMap:
        """Nothing of a hypothesis is kept."""
        return state


def chain_params(**options: Any) -> BeamSearch.Params:
    """A search that goes on for some time, in which every option is at work."""
    defaults: dict[str, Any] = dict(
        target_sos_id=SOS, target_eos_id=EOS, num_hyps_per_beam=3, num_best=3, target_seq_len=9, beam_size=5.0,
        length_normalization=0.6, coverage_penalty=0.2, min_seq_len=2, device_loop=True, device_loop_steps=3,
    )  # fmt: skip
    return BeamSearch.Params(**defaults | options)


def test_the_guard_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    waits = (
        lambda: values[0].item(), lambda: bool(values.any()), lambda: int(values.sum()), lambda: values.nonzero(),
        lambda: values.tolist(), lambda: torch.equal(values, values), lambda: values[values > 0],
    )  # fmt: skip
    for wait in waits:
        with no_waiting(monkeypatch), pytest.raises(AssertionError, match="waits for the device"):
            wait()


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("reference", {}),
        ("reference", {"candidates": "merged", "termination": "never"}),
        ("reference", {"keep_unfinished": True, "force_eos_in_last_step": False}),
        ("triton", {"target_seq_len": 4, "num_hyps_per_beam": 2}),
    ],
)
def test_no_step_waits(implementation: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step to the last: no value is read back but in the looks."""
    if implementation == "triton":
        needs_kernels()
    p, decoder, source = chain_params(**options), ChainDecoder(num_sources=4, vocab=11), sources(4)
    wanted = beam_search(decoder, source=source, params=p.replace(device_loop=False))
    monkeypatch.setenv("MEGASEQ_KERNELS", f"beam_step={implementation}")
    search: BeamSearch = p.instantiate()
    start = search.start(decoder, source=source)
    loop = DeviceLoop(search._rules, constraints=search._constraints, steps_between_looks=p.device_loop_steps)
    with torch.no_grad(), no_waiting(monkeypatch):
        finished = loop.search(decoder, start=start, num_steps=int(p.target_seq_len), prefix=None)
    check_equal(finished.hypotheses(num_best=3), wanted)


@pytest.mark.parametrize("name", ["t5-shared", "sinusoidal"])
def test_own_layers_do_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of the library, its caches as on a GPU."""
    model, source = model_of(name), sources(3)
    source.ids.clamp_(min=4)
    source.segment_ids[1, 3:] = 0
    p = chain_params(coverage_penalty=0.0, beam_size=2.0)
    wanted = beam_search(model, source=source, params=p.replace(device_loop=False))
    monkeypatch.setenv("MEGASEQ_KERNELS", "beam_step=reference,decode_attention=reference")
    search: BeamSearch = p.instantiate()
    start = search.start(model, source=source)
    loop = DeviceLoop(search._rules, constraints=search._constraints, steps_between_looks=2)
    with torch.no_grad(), no_waiting(monkeypatch):
        finished = loop.search(model, start=start, num_steps=p.target_seq_len, prefix=None)
    check_equal(finished.hypotheses(num_best=3), wanted)


def flat(loop: LoopState) -> list[torch.Tensor]:
    """All tensors of a state."""
    own = [value for value in vars(loop).values() if isinstance(value, torch.Tensor)]
    return own + list(vars(loop.finished).values())


def rebuilt(like: LoopState, tensors: list[torch.Tensor]) -> LoopState:
    """The state that has these tensors."""
    rest = iter(tensors)
    loop, finished = copy.copy(like), copy.copy(like.finished)
    for name, value in vars(like).items():
        if isinstance(value, torch.Tensor):
            setattr(loop, name, next(rest))
    for name in vars(like.finished):
        setattr(finished, name, next(rest))
    loop.finished = finished
    return loop


def test_every_step_is_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations recorded at one step, replayed with the tensors of later ones, do what the loop does there."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "beam_step=reference")
    p, decoder = chain_params(), ChainDecoder(num_sources=4, vocab=11)
    search: BeamSearch = p.instantiate()
    loop = DeviceLoop(search._rules, constraints=search._constraints, steps_between_looks=99)
    start = search.start(decoder, source=sources(4))
    state = LoopState.begin(start, size=3, num_steps=p.target_seq_len, covered=True)
    graph = None
    for step in range(p.target_seq_len):
        tokens = start.tokens if step == 0 else state.ids[..., step - 1].reshape(-1)
        logits, model = decoder.step(start.state, tokens=tokens)
        state.add_attention(model.attention_probs)

        def advance(tensors: list[torch.Tensor], logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            new = rebuilt(state, [tensor.clone() for tensor in tensors])
            parents = loop.advance(new, logits=logits, normalised=False, first=False).parents
            return parents, flat(new)

        if step == 1:
            graph = make_fx(advance)(flat(state), logits)
        if graph is not None:
            parents, replayed = graph(flat(state), logits)
        wanted = loop.advance(state, logits=logits, normalised=False, first=step == 0).parents
        if graph is not None:
            assert torch.equal(parents, wanted)
            for mine, theirs in zip(replayed, flat(state), strict=True):
                assert torch.equal(mine, theirs)
    assert isinstance(state.finished, Finished) and bool(state.finished.count.all())
