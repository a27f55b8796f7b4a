"""Beam search on models that are tables: against a plain reference, against exhaustive search, option by option."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megaseq.base import NestedMap, ParamsError
from megaseq.decode import BeamSearch, DecodeError, Hypothesis, SuppressedTokens, beam_search

from . import lingvo_reference
from .table_decoder import EOS, SOS, TableDecoder, sources

Table = Callable[[int, tuple[int, ...]], Sequence[float]]


def random_table(seed: int, *, vocab: int, spread: float = 1.5) -> Table:
    """Log-probabilities that depend on the source and on every token so far."""
    known: dict[tuple[int, tuple[int, ...]], list[float]] = {}

    def table(source: int, ids: tuple[int, ...]) -> Sequence[float]:
        if (source, ids) not in known:
            generator = torch.Generator().manual_seed(hash((seed, source, ids)) % 2**31)
            known[source, ids] = (torch.randn(vocab, generator=generator) * spread).log_softmax(0).tolist()
        return known[source, ids]

    return table


def random_attention(seed: int, *, length: int) -> Table:
    """Distributions over source positions."""

    def attention(source: int, ids: tuple[int, ...]) -> Sequence[float]:
        generator = torch.Generator().manual_seed(hash((seed, source, ids, 7)) % 2**31)
        return (torch.randn(length, generator=generator) * 2).softmax(0).tolist()

    return attention


def run(decoder: TableDecoder, *, count: int = 1, prefix: Any = None, **options: Any) -> list[list[Hypothesis]]:
    """Searches with the table's special tokens."""
    defaults: dict[str, Any] = dict(target_sos_id=SOS, target_eos_id=EOS, num_best=50)
    params = BeamSearch.Params(**(defaults | options))
    return beam_search(decoder, source=sources(count), params=params, prefix=prefix)


def log(*probabilities: float) -> list[float]:
    """Log-probabilities."""
    return [math.log(p) if p > 0 else -math.inf for p in probabilities]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(3, 9),
    num_hyps=st.integers(1, 5),
    steps=st.integers(1, 6),
    beam_size=st.sampled_from([0.3, 1.0, 3.0, 100.0]),
    alpha=st.sampled_from([0.0, 0.6, 1.0]),
    beta=st.sampled_from([0.0, 0.3]),
    ratio=st.sampled_from([1.0, 1.7]),
    delta=st.sampled_from([0.5, 2.0, 5.0]),
    local=st.sampled_from([-1.5, -100.0]),
    flags=st.tuples(*[st.booleans()] * 4),
)
def test_equals_the_reference(
    seed: int, vocab: int, num_hyps: int, steps: int, beam_size: float, alpha: float, beta: float, ratio: float,
    delta: float, local: float, flags: tuple[bool, bool, bool, bool],
) -> None:  # fmt: skip
    """Every terminated hypothesis, its score and its rank, for every mix of options, several sources at once."""
    ensure_full, force_top, force_last, allow_empty = flags
    table, attention = random_table(seed, vocab=vocab), random_attention(seed, length=4)
    got = run(
        TableDecoder(table, attention), count=3, num_hyps_per_beam=num_hyps, target_seq_len=steps, beam_size=beam_size,
        length_normalization=alpha, coverage_penalty=beta, target_seq_length_ratio=ratio,
        valid_eos_max_logit_delta=delta, local_eos_threshold=local, ensure_full_beam=ensure_full,
        force_eos_in_top_k=force_top, force_eos_in_last_step=force_last, allow_empty_terminated_hyp=allow_empty,
    )  # fmt: skip
    option = lingvo_reference.Settings(
        num_hyps, steps, EOS, beam_size, alpha, beta, ratio, delta, local,
        ensure_full, force_top, force_last, allow_empty,
    )  # fmt: skip
    for source in range(3):
        wanted = lingvo_reference.search(
            lambda ids, source=source: table(source, ids), settings=option,
            attention=lambda ids, source=source: attention(source, ids),
        )  # fmt: skip
        assert [hyp.ids for hyp in got[source]] == [hyp.ids for hyp in wanted]
        for mine, theirs in zip(got[source], wanted, strict=True):
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 4), steps=st.integers(1, 4), alpha=st.sampled_from([0.0, 0.9]))
def test_a_wide_beam_is_exhaustive(seed: int, vocab: int, steps: int, alpha: float) -> None:
    """With room for every hypothesis, the list is all outputs in order of score, and scores are sums."""
    table = random_table(seed, vocab=vocab)
    tokens = [v for v in range(vocab) if v != EOS]
    wanted = []
    for length in range(steps):
        for ids in itertools.product(tokens, repeat=length):
            full = (*ids, EOS)
            logprob = sum(table(0, full[:n])[token] for n, token in enumerate(full))
            wanted.append((logprob / ((length + 6) / 5) ** alpha, ids))
    wanted.sort(reverse=True)
    got = run(
        TableDecoder(table), num_hyps_per_beam=vocab**steps, num_best=10**4, target_seq_len=steps, beam_size=1e9,
        length_normalization=alpha, valid_eos_max_logit_delta=1e9,
    )[0]  # fmt: skip
    assert [hyp.ids for hyp in got] == [ids for _, ids in wanted]
    for hyp, (score, _) in zip(got, wanted, strict=True):
        assert hyp.score == pytest.approx(score, abs=1e-4)


def test_unnormalised_logits_score_like_log_probabilities() -> None:
    """Adding a constant to all logits of a step changes nothing."""
    table = random_table(3, vocab=6)
    shifted = TableDecoder(lambda source, ids: [value + 5.0 + len(ids) for value in table(source, ids)])
    options = dict(count=3, num_hyps_per_beam=3, target_seq_len=6)
    for mine, theirs in zip(run(shifted, **options), run(TableDecoder(table), **options), strict=True):
        assert [h.ids for h in mine] == [h.ids for h in theirs]
        assert [h.score for h in mine] == pytest.approx([h.score for h in theirs], abs=1e-4)


def test_ties_fall_to_the_lower_word_then_the_lower_hypothesis() -> None:
    """Uniform scores: the beam is the lowest words, whatever top-k happens to take first."""
    flat = TableDecoder(lambda source, ids: [0.0] * 9)
    got = run(flat, num_hyps_per_beam=3, target_seq_len=3, beam_size=1e9)[0]
    by_length = {n: [hyp.ids for hyp in got if len(hyp.ids) == n] for n in range(3)}
    # Words 0, 2, 3 go on (1 ends). At step two, word 0 of all three hypotheses comes before word 2 of the first.
    assert by_length == {0: [()], 1: [(0,), (2,), (3,)], 2: [(0, 0), (2, 0), (3, 0)]}


def test_the_score_gap_stops_the_search() -> None:
    """The end has 0.7 at once: a gap of 1 nat is reached after one step, one of 50 never."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.7, 0.2, 0.1))
    run(table, num_hyps_per_beam=2, target_seq_len=9, beam_size=1.0)
    assert table.rows_per_step == [1]
    table.rows_per_step.clear()
    run(table, num_hyps_per_beam=2, target_seq_len=9, beam_size=50.0)
    assert table.rows_per_step == [1] + [2] * 8


def test_ensure_full_beam_waits_for_the_beam() -> None:
    """The gap is reached at once, but K = 3 hypotheses must finish: one at step 0, two at step 1."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.9, 0.06, 0.04))
    assert len(run(table, num_hyps_per_beam=3, target_seq_len=9, beam_size=1.0)[0]) == 1
    got = run(table, num_hyps_per_beam=3, target_seq_len=9, beam_size=1.0, ensure_full_beam=True)[0]
    assert [hyp.ids for hyp in got] == [(), (2,), (3,)]


def test_sources_leave_the_batch_or_wait_for_each_other() -> None:
    """Source 0 ends at once, source 1 late."""

    def table(source: int, ids: tuple[int, ...]) -> list[float]:
        ends = source == 0 or len(ids) == 4
        return log(0.0, 0.9, 0.06, 0.04) if ends else log(0.0, 0.0, 0.9, 0.1)

    decoder = TableDecoder(table)
    alone = run(decoder, count=2, num_hyps_per_beam=2, target_seq_len=8, beam_size=1.0)
    assert decoder.rows_per_step == [2, 2, 2, 2, 2]
    decoder.rows_per_step.clear()
    options = dict(num_hyps_per_beam=2, target_seq_len=8, beam_size=1.0, terminate_beams_independently=False)
    together = run(decoder, count=2, **options)
    assert decoder.rows_per_step == [2, 4, 4, 4, 4]
    # The source that waited kept on finding hypotheses; the best did not change.
    assert [hyps[0] for hyps in alone] == [hyps[0] for hyps in together]
    assert len(together[0]) > len(alone[0])


@pytest.mark.parametrize(("delta", "ends"), [(1.0, False), (3.0, True)])
def test_valid_eos_max_logit_delta(delta: float, ends: bool) -> None:
    """The end has 0.1 against 0.8, 2.1 nats apart."""
    table = TableDecoder(lambda source, ids: log(0.05, 0.1, 0.8, 0.05))
    options = dict(target_seq_len=2, beam_size=1e9, force_eos_in_last_step=False)
    got = run(table, num_hyps_per_beam=3, valid_eos_max_logit_delta=delta, **options)[0]
    assert any(hyp.ids == () for hyp in got) == ends


@pytest.mark.parametrize(("threshold", "ends"), [(-2.0, False), (-2.5, True)])
def test_local_eos_threshold(threshold: float, ends: bool) -> None:
    """The end has log 0.1 = -2.3."""
    table = TableDecoder(lambda source, ids: log(0.05, 0.1, 0.8, 0.05))
    options = dict(target_seq_len=2, beam_size=1e9, force_eos_in_last_step=False)
    got = run(table, num_hyps_per_beam=3, local_eos_threshold=threshold, **options)[0]
    assert any(hyp.ids == () for hyp in got) == ends


def test_force_eos_in_top_k() -> None:
    """The end is the last of five tokens and the beam is one wide: only forcing considers it."""
    table = TableDecoder(lambda source, ids: log(0.3, 0.1, 0.3, 0.2, 0.1))
    options = dict(num_hyps_per_beam=1, target_seq_len=1, force_eos_in_last_step=False)
    assert run(table, **options) == [[]]
    assert [hyp.ids for hyp in run(table, force_eos_in_top_k=True, **options)[0]] == [()]


def test_what_runs_into_the_limit() -> None:
    """Nothing, an end with its own probability, or the hypotheses as they are."""
    table = TableDecoder(lambda source, ids: log(0.0, 1e-4, 0.6, 0.3999))
    options = dict(num_hyps_per_beam=2, target_seq_len=2)
    assert run(table, force_eos_in_last_step=False, **options) == [[]]
    forced = run(table, force_eos_in_last_step=True, **options)[0]
    assert [hyp.ids for hyp in forced] == [(2,), (3,)] and all(hyp.ended for hyp in forced)
    assert forced[0].logprob == pytest.approx(math.log(0.6 * 1e-4), abs=1e-4)
    kept = run(table, force_eos_in_last_step=False, keep_unfinished=True, **options)[0]
    assert kept[0].ids == (2, 2) and len(kept) == 2 and not any(hyp.ended for hyp in kept)
    assert kept[0].logprob == pytest.approx(math.log(0.36), abs=1e-4)


def test_allow_empty_terminated_hyp() -> None:
    """The empty output is the best one, unless it is not allowed."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.9, 0.06, 0.04))
    assert run(table, num_hyps_per_beam=2, target_seq_len=4)[0][0].ids == ()
    got = run(table, num_hyps_per_beam=2, target_seq_len=4, allow_empty_terminated_hyp=False)[0]
    assert got[0].ids == (2,)


def test_length_terms() -> None:
    """The value of both conventions: the end token counts."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.0, 0.5, 0.5) if len(ids) < 2 else log(0.0, 1.0, 0.0, 0.0))
    options = dict(num_hyps_per_beam=1, target_seq_len=5)
    raw = 2 * math.log(0.5)
    assert run(table, **options)[0][0].score == pytest.approx(raw)
    assert run(table, length_normalization=0.6, **options)[0][0].score == pytest.approx(raw / (8 / 5) ** 0.6)
    assert run(table, length_penalty=0.6, **options)[0][0].score == pytest.approx(raw / 3**0.6)


def test_coverage_penalty_value() -> None:
    """ratio * beta * sum of log(clamp(attention / ratio, 0.001, 0.5)), the step that ends included."""
    rows = [(0.5, 0.5, 0.0, 0.0), (0.9, 0.0, 0.1, 0.0), (0.0, 0.0, 0.2, 0.8)]
    table = TableDecoder(
        lambda source, ids: log(0.0, 0.0, 0.5, 0.5) if len(ids) < 2 else log(0.0, 1.0, 0.0, 0.0),
        attention=lambda source, ids: rows[len(ids)],
    )
    options = dict(num_hyps_per_beam=1, target_seq_len=5, coverage_penalty=0.2, target_seq_length_ratio=2.0)
    got = run(table, **options)[0][0]
    total = [min(max(value / 2.0, 0.001), 0.5) for value in (1.4, 0.5, 0.3, 0.8)]
    wanted = 2 * math.log(0.5) + 2.0 * 0.2 * sum(math.log(value) for value in total)
    assert got.score == pytest.approx(wanted, abs=1e-5)
    assert got.logprob == pytest.approx(2 * math.log(0.5), abs=1e-5)


def test_coverage_ignores_padding() -> None:
    """A padded source has the score that it has alone."""
    attention = random_attention(5, length=4)
    decoder = TableDecoder(random_table(5, vocab=5), lambda source, ids: [*attention(source, ids)[:3], 0.0])
    params = BeamSearch.Params(target_sos_id=SOS, target_eos_id=EOS, target_seq_len=4, coverage_penalty=0.5)
    source = sources(1)
    source.segment_ids = torch.tensor([[1, 1, 1, 0]])
    padded = beam_search(decoder, source=source, params=params)
    decoder = TableDecoder(random_table(5, vocab=5), lambda source, ids: attention(source, ids)[:3])
    assert padded == beam_search(decoder, source=sources(1, length=3), params=params)


def test_coverage_needs_attention() -> None:
    """A clear error from a decoder that knows no attention, and from one that gives none."""
    with pytest.raises(DecodeError, match="coverage_penalty: must meet a decoder that reports attention_probs"):
        run(TableDecoder(lambda source, ids: [0.0] * 4), coverage_penalty=0.1)

    class Plain(TableDecoder):
        def step(self, state: Any, *, tokens: torch.Tensor) -> Any:  # type: ignore[override]
            return super().step(state, tokens=tokens)

    with pytest.raises(DecodeError, match="takes need_attention, but Plain does not"):
        run(Plain(lambda source, ids: [0.0] * 4), coverage_penalty=0.1)


def test_length_limits() -> None:
    """Absolute and by ratio; the tighter wins."""
    never = TableDecoder(lambda source, ids: log(0.0, 1e-6, 0.5, 0.5))
    lengths = {
        (("target_seq_len", 5),): 4,
        (("target_seq_len", 50), ("max_length_ratio", 1.5)): 5,
        (("target_seq_len", 50), ("max_length_ratio", 1.5), ("max_length_offset", 2)): 7,
        (("target_seq_len", 3), ("max_length_ratio", 1.5)): 2,
    }
    for options, length in lengths.items():
        assert {len(hyp.ids) for hyp in run(never, num_hyps_per_beam=2, **dict(options))[0]} == {length}
    at_once = TableDecoder(lambda source, ids: log(0.0, 0.9, 0.05, 0.05))
    for option, shortest in ({"min_seq_len": 3}, 3), ({"min_length_ratio": 0.5}, 2), ({"min_length_ratio": 9.0}, 6):
        got = run(at_once, num_hyps_per_beam=2, target_seq_len=7, **option)[0]
        assert min(len(hyp.ids) for hyp in got) == shortest


def test_limits_differ_by_source() -> None:
    """Each source has the limit of its own length."""
    never = TableDecoder(lambda source, ids: log(0.0, 1e-6, 0.5, 0.5))
    source = sources(2)
    source.segment_ids = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    params = BeamSearch.Params(target_sos_id=SOS, target_eos_id=EOS, max_length_ratio=2.0, num_hyps_per_beam=2)
    got = beam_search(never, source=source, params=params)
    assert [len(hyps[0].ids) for hyps in got] == [7, 3]
    assert never.rows_per_step == [2, 4, 4, 4, 2, 2, 2, 2]


def test_num_best() -> None:
    """The list is cut, not the search."""
    table = random_table(9, vocab=6)
    many = run(TableDecoder(table), num_hyps_per_beam=3, target_seq_len=5, beam_size=9.0)[0]
    assert len(many) > 4
    assert run(TableDecoder(table), num_hyps_per_beam=3, target_seq_len=5, beam_size=9.0, num_best=2)[0] == many[:2]


def test_candidates_merged_or_per_hypothesis() -> None:
    """The end token is second in its hypothesis, but not among the best K of the source."""
    table = TableDecoder(lambda source, ids: log(0.3, 0.2, 0.3, 0.2))
    options = dict(num_hyps_per_beam=2, target_seq_len=1, force_eos_in_last_step=False)
    assert [hyp.ids for hyp in run(table, candidates="per_hyp", **options)[0]] == [()]
    assert run(table, candidates="merged", **options) == [[]]


@pytest.mark.parametrize(("termination", "steps"), [("full_beam", 2), ("heuristic", 2), ("never", 7)])
def test_other_terminations(termination: str, steps: int) -> None:
    """K = 2 have finished after two steps, the worse at log(0.18) / 2 = -0.86. `never` goes on until the best active
    one could not beat that even at length 9: 7 log(0.3) / 9 = -0.94."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.6, 0.3, 0.1))
    run(table, num_hyps_per_beam=2, target_seq_len=9, termination=termination, length_penalty=1.0)
    assert len(table.rows_per_step) == steps


def test_forced_prefix() -> None:
    """Each source begins as told; the prefix counts in the score; negative ids are free."""
    table = random_table(11, vocab=6)
    prefix = torch.tensor([[4, 5], [3, -1], [-1, -1]])
    got = run(TableDecoder(table), count=3, num_hyps_per_beam=3, target_seq_len=5, prefix=prefix)
    assert all(hyp.ids[:2] == (4, 5) for hyp in got[0]) and all(hyp.ids[:1] == (3,) for hyp in got[1])
    assert got[2] == run(TableDecoder(table), count=3, num_hyps_per_beam=3, target_seq_len=5)[2]
    full = (*got[0][0].ids, EOS)
    wanted = sum(table(0, full[:n])[token] for n, token in enumerate(full))
    assert got[0][0].logprob == pytest.approx(wanted, abs=1e-4)


def test_masks_do_not_renormalise() -> None:
    """Forbidding a token leaves the log-probabilities of the others."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.2, 0.5, 0.3))
    got = run(table, num_hyps_per_beam=1, target_seq_len=2, processors=(SuppressedTokens.Params(token_ids=(2,)),))[0]
    assert [hyp.ids for hyp in got] == [(), (3,)]
    assert got[1].logprob == pytest.approx(math.log(0.3 * 0.2), abs=1e-5)


def test_batch_composition_does_not_matter() -> None:
    """Every source has the hypotheses that it has alone."""
    table = random_table(13, vocab=7)
    together = run(TableDecoder(table), count=6, num_hyps_per_beam=3, target_seq_len=6, beam_size=1.0)
    params = BeamSearch.Params(
        target_sos_id=SOS, target_eos_id=EOS, num_hyps_per_beam=3, target_seq_len=6, beam_size=1.0, num_best=50
    )
    for index in range(6):
        assert beam_search(TableDecoder(table), source=sources(1, first=index), params=params)[0] == together[index]


def test_the_cache_is_left_alone_when_nothing_moves() -> None:
    """A beam of one only ever grows: no select."""
    decoder = TableDecoder(lambda source, ids: log(0.0, 1e-6, 0.5, 0.5))
    run(decoder, num_hyps_per_beam=1, target_seq_len=6)
    assert len(decoder.rows_per_step) == 6 and decoder.selects == 0


def test_nan_is_reported() -> None:
    """Which step, and what to look at."""
    table = TableDecoder(lambda source, ids: [math.nan] * 4 if len(ids) == 2 else log(0.0, 0.1, 0.5, 0.4))
    with pytest.raises(DecodeError, match="logits: must hold no NaN, but do at step 2"):
        run(table, num_hyps_per_beam=2, target_seq_len=5, beam_size=1e9)


def test_impossible_tokens_are_no_nan() -> None:
    """-inf is allowed; a source whose every continuation is impossible ends without hypotheses."""
    table = TableDecoder(lambda source, ids: [-math.inf] * 4 if source else log(0.0, 0.5, 0.5, 0.0))
    got = run(table, count=2, num_hyps_per_beam=2, target_seq_len=3)
    assert [hyp.ids for hyp in got[0]] == [(), (2,), (2, 2)] and got[1] == []


def test_no_sources() -> None:
    """An empty batch gives an empty list."""
    assert run(TableDecoder(lambda source, ids: [0.0] * 4), count=0) == []


def test_packed_sources_are_refused() -> None:
    """Two segments in a row are not one source."""
    source = NestedMap(ids=torch.ones(1, 4, dtype=torch.long), segment_ids=torch.tensor([[1, 1, 2, 2]]))
    with pytest.raises(DecodeError, match="must hold one source a row"):
        beam_search(TableDecoder(lambda source, ids: [0.0] * 4), source=source, params=BeamSearch.Params())


@pytest.mark.parametrize(
    "options",
    [
        {"num_hyps_per_beam": 0}, {"num_best": 0}, {"beam_size": 0.0}, {"target_seq_len": 0}, {"min_seq_len": 256},
        {"length_penalty": 1.0, "length_normalization": 0.5}, {"keep_unfinished": True}, {"max_length_ratio": -1.0},
        {"target_seq_length_ratio": 0.0},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    """All by name, before any work."""
    with pytest.raises(ParamsError, match=next(iter(options))):
        BeamSearch.Params(**options).instantiate()


def test_end_token_outside_the_vocabulary() -> None:
    """A wrong id is said, not an index error."""
    with pytest.raises(DecodeError, match="target_eos_id: must be below the vocabulary's 3"):
        run(TableDecoder(lambda source, ids: [0.0] * 3), target_eos_id=3)


def test_special_tokens_of_a_search_alone() -> None:
    """Those of the library's tokenizers; the params stay open, so that a task can fill them."""
    params = BeamSearch.Params()
    search = params.instantiate()
    assert (search.sos_id, search.eos_id) == (2, 3)
    assert params.target_sos_id is None and not params.check()
    problems = BeamSearch.Params(target_eos_id=-1, min_seq_len=256).check()
    assert [str(problem).split(":")[0] for problem in problems] == ["target_eos_id", "min_seq_len"]


class DistantDecoder(TableDecoder):
    """Its logits lie elsewhere: whoever wants the best alone is given no others."""

    vocab_size = 7

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.asked: list[str] = []

    def step(self, state: Any, *, tokens: torch.Tensor, need_attention: bool = False) -> tuple[torch.Tensor, Any]:
        self.asked.append("all")
        return super().step(state, tokens=tokens, need_attention=need_attention)

    def step_best(self, state: Any, *, tokens: torch.Tensor, best: Callable[..., Any], count: int) -> tuple[Any, Any]:
        logits, after = super().step(state, tokens=tokens)
        found = best(logits)
        assert found[0].shape == found[1].shape == (tokens.shape[0], min(count, self.vocab_size))
        self.asked.append("best")
        return found, after


@pytest.mark.parametrize("options", [{}, {"candidates": "merged"}, {"num_hyps_per_beam": 9}, {"max_length_ratio": 2.0}])
def test_the_best_tokens_are_enough_without_constraints(options: dict[str, Any]) -> None:
    table = random_table(3, vocab=7)
    options = {"num_hyps_per_beam": 3, "target_seq_len": 6} | options
    decoder = DistantDecoder(table)
    assert run(decoder, count=4, **options) == run(TableDecoder(table), count=4, **options)
    assert set(decoder.asked) == {"best"}


@pytest.mark.parametrize(
    "options",
    [
        {"processors": (SuppressedTokens.Params(token_ids=(2,)),)},
        {"min_seq_len": 2},
        {"min_length_ratio": 0.5},
        {"prefix": torch.tensor([[4]])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_constraints_ask_for_all_logits(options: dict[str, Any]) -> None:
    table = random_table(3, vocab=7)
    options = {"num_hyps_per_beam": 3, "target_seq_len": 6} | options
    decoder = DistantDecoder(table)
    assert run(decoder, **options) == run(TableDecoder(table), **options)
    assert set(decoder.asked) == {"all"}
