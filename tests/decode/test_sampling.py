"""Sampling: distributions, truncation, reproducibility; greedy search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megaseq.base import ParamsError
from megaseq.decode import DecodeError, GreedySearch, Hypothesis, Sampler, SuppressedTokens, greedy_search, sample
from megaseq.decode.random_bits import uniform

from .table_decoder import EOS, SOS, TableDecoder, sources
from .test_beam_search import log, random_table

PROBABILITIES = (0.05, 0.1, 0.4, 0.25, 0.15, 0.05)


def run(
    decoder: TableDecoder, *, count: int = 1, first: int = 0, keys: Any = None, **options: Any
) -> list[list[Hypothesis]]:
    """Samples with the table's special tokens."""
    params = Sampler.Params(**(dict(target_sos_id=SOS, target_eos_id=EOS) | options))
    return sample(decoder, source=sources(count, first=first), params=params, keys=keys)


def first_tokens(num: int, **options: Any) -> torch.Tensor:
    """How often each token came first among `num` samples of `PROBABILITIES`."""
    table = TableDecoder(lambda source, ids: log(*PROBABILITIES))
    hyps = run(table, num_samples=num, target_seq_len=1, **options)[0]
    return torch.bincount(torch.tensor([hyp.ids[0] if hyp.ids else EOS for hyp in hyps]), minlength=6)


def truncated(probabilities: tuple[float, ...] = PROBABILITIES, **options: Any) -> list[float]:
    """The distribution that is drawn from."""
    sampler = Sampler.Params(**options).instantiate()
    return sampler.truncated(torch.tensor(log(*probabilities))).exp().tolist()


def chi_square(counts: torch.Tensor, *, probabilities: list[float]) -> float:
    """Pearson's statistic over the possible tokens; impossible ones must not have come."""
    wanted = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    assert counts[wanted == 0].sum() == 0
    possible = wanted > 0
    return float(((counts[possible] - wanted[possible]) ** 2 / wanted[possible]).sum())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"nucleus_p": 0.7}, {"min_p": 0.3}, {"epsilon": 0.12}]
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square of 6,000 draws, below the 99.9 % point of five degrees of freedom."""
    counts = first_tokens(6000, seed=5, **options)
    assert chi_square(counts, probabilities=truncated(**options)) < 20.5


def test_truncation_by_hand() -> None:
    """What each option leaves."""
    assert truncated() == pytest.approx(PROBABILITIES)
    roots = [math.sqrt(p) for p in PROBABILITIES]
    assert truncated(temperature=2.0) == pytest.approx([root / sum(roots) for root in roots])
    assert truncated(top_k=2) == pytest.approx([0, 0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])
    assert truncated(nucleus_p=0.5) == pytest.approx([0, 0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])
    assert truncated(nucleus_p=0.3) == pytest.approx([0, 0, 1, 0, 0, 0])
    assert truncated(min_p=0.5) == pytest.approx([0, 0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])
    assert truncated(epsilon=0.2) == pytest.approx([0, 0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])


def test_top_k_ties_and_renormalising() -> None:
    """Ties go to the lower ids; nucleus and epsilon see renormalised probabilities or not."""
    assert truncated((0.2, 0.2, 0.2, 0.2, 0.2), top_k=2) == pytest.approx([0.5, 0.5, 0, 0, 0])
    # Of 0.4 and 0.25 the first has 0.62 of the mass once renormalised, which alone makes up the nucleus of 0.6.
    assert truncated(top_k=2, nucleus_p=0.6) == pytest.approx([0, 0, 1, 0, 0, 0])
    both = [0, 0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]
    assert truncated(top_k=2, nucleus_p=0.6, top_k_renormalize=False) == pytest.approx(both)


def test_epsilon_fail_safe() -> None:
    """When it would drop all: the best token, or no dropping."""
    assert truncated(epsilon=0.9) == pytest.approx([0, 0, 1, 0, 0, 0])
    assert truncated(epsilon=0.9, eps_fail_safe=False) == pytest.approx(PROBABILITIES)


def test_draws_do_not_depend_on_the_batch_or_on_other_samples() -> None:
    """The same seed, source and sample number give the same output wherever they are decoded."""
    table = random_table(3, vocab=8, spread=0.5)
    together = run(TableDecoder(table), count=5, num_samples=4, target_seq_len=9)
    fewer = run(TableDecoder(table), count=5, num_samples=2, target_seq_len=9)
    assert [hyps[:2] for hyps in together] == fewer
    for index in range(5):
        alone = run(TableDecoder(table), first=index, num_samples=4, target_seq_len=9, keys=torch.tensor([index]))
        assert alone[0] == together[index]


def test_seeds_sources_and_samples_differ() -> None:
    """Nothing is drawn twice."""
    table = TableDecoder(lambda source, ids: [0.0, -99.0, *[0.0] * 30])
    options = dict(count=3, num_samples=3, target_seq_len=8)
    outputs = [hyp.ids for seed in (1, 2) for hyps in run(table, seed=seed, **options) for hyp in hyps]
    assert len(set(outputs)) == 18
    assert run(table, seed=1, **options) == run(table, seed=1, **options)


def test_stops_when_all_have_ended_at_different_steps() -> None:
    """Lingvo waited for all to end in the same step; here a source leaves with its last sample."""

    def table(source: int, ids: tuple[int, ...]) -> list[float]:
        ends = bool(ids) and (ids[0] == 2 or len(ids) == 3)
        return log(0.0, 1.0, 0.0, 0.0) if ends else log(0.0, 0.0, 0.5, 0.5)

    decoder = TableDecoder(table)
    got = run(decoder, count=2, num_samples=8, target_seq_len=50)
    assert {len(hyp.ids) for hyps in got for hyp in hyps} == {1, 3}
    assert decoder.rows_per_step == [2, 16, 16, 16]


def test_scores_are_those_of_the_drawn_distribution() -> None:
    """`logprob` is the model's, `score` that of what was drawn from; the end counts."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.1, 0.5, 0.4) if not ids else log(0.0, 1.0, 0.0, 0.0))
    for hyp in run(table, num_samples=20, top_k=2, target_seq_len=4)[0]:
        probability = {2: 0.5, 3: 0.4}[hyp.ids[0]]
        assert hyp.logprob == pytest.approx(math.log(probability), abs=1e-5)
        assert hyp.score == pytest.approx(math.log(probability / 0.9), abs=1e-5)
        assert hyp.ended


def test_limits_prefix_and_constraints() -> None:
    """What beam search takes, sampling takes too."""
    table = TableDecoder(lambda source, ids: log(0.0, 0.9, 0.05, 0.05))
    got = run(table, num_samples=30, target_seq_len=5, min_seq_len=3)[0]
    assert all(3 <= len(hyp.ids) <= 5 for hyp in got)
    assert any(not hyp.ended for hyp in got) == any(len(hyp.ids) == 5 for hyp in got)
    banned = run(table, num_samples=30, target_seq_len=5, processors=(SuppressedTokens.Params(token_ids=(1, 2)),))[0]
    assert {hyp.ids for hyp in banned} == {(3,) * 5}
    params = Sampler.Params(target_sos_id=SOS, target_eos_id=EOS, target_seq_len=3)
    got = sample(table, source=sources(2), params=params, prefix=torch.tensor([[2, 3], [3, -1]]))
    assert got[0][0].ids[:2] == (2, 3) and got[1][0].ids[0] == 3


def test_uniform_numbers_are_uniform() -> None:
    """Chi-square over ten bins for consecutive keys of each kind; all in [0, 1), all different."""
    keys = torch.arange(20000)
    for numbers in (uniform(1, keys, 0, 0), uniform(keys, 1, 0, 0), uniform(1, 2, 3, keys)):
        counts = torch.bincount((numbers * 10).long(), minlength=10)
        assert chi_square(counts, probabilities=[0.1] * 10) < 27.9  # 99.9 % point of nine degrees of freedom
        assert numbers.min() >= 0 and numbers.max() < 1 and numbers.unique().numel() == 20000


def test_greedy() -> None:
    """The best token at every step, the lowest id among equals; sources leave as they end."""

    def table(source: int, ids: tuple[int, ...]) -> list[float]:
        return log(0.0, 1.0, 0.0, 0.0) if len(ids) == source else log(0.0, 0.2, 0.4, 0.4)

    decoder = TableDecoder(table)
    params = GreedySearch.Params(target_sos_id=SOS, target_eos_id=EOS, target_seq_len=3)
    got = greedy_search(decoder, source=sources(4), params=params)
    assert [hyps[0].ids for hyps in got] == [(), (2,), (2, 2), (2, 2, 2)]
    assert [hyps[0].ended for hyps in got] == [True, True, True, False]
    assert got[2][0].logprob == pytest.approx(2 * math.log(0.4), abs=1e-5)
    assert decoder.rows_per_step == [4, 3, 2]


def test_nan_is_reported() -> None:
    """Also here."""
    params = GreedySearch.Params(target_sos_id=SOS, target_eos_id=EOS)
    with pytest.raises(DecodeError, match="must hold no NaN, but do at step 0"):
        greedy_search(TableDecoder(lambda source, ids: [math.nan] * 4), source=sources(1), params=params)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k": -1}, {"nucleus_p": 0.0}, {"min_p": 1.0}, {"epsilon": -0.1}, {"num_samples": 0}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    """By name."""
    with pytest.raises(ParamsError, match=next(iter(options))):
        Sampler.Params(**options).instantiate()


def test_end_token_outside_the_vocabulary() -> None:
    """Without it no output would end before the length limit."""
    table = TableDecoder(lambda source, ids: [0.0] * 3)
    with pytest.raises(DecodeError, match="target_eos_id: must be below the vocabulary's 3, but is 3"):
        run(table, target_eos_id=3)
    with pytest.raises(DecodeError, match="target_eos_id: must be below the vocabulary's 3, but is 5"):
        greedy_search(table, source=sources(1), params=GreedySearch.Params(target_sos_id=SOS, target_eos_id=5))
