"""The schedules against their formulas at step 0, in the warm-up, at boundaries and past the end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseq.base import ParamsError
from megaseq.learner import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Piecewise,
    Polynomial,
    Schedule,
    Warmup,
    WarmupStableDecay,
)


def values(p: Schedule.Params, *steps: int) -> list[float]:
    schedule = p.instantiate()
    return [schedule(step) for step in steps]


def test_constant() -> None:
    assert values(Constant.Params(value=0.25), 0, 1, 10**9) == [0.25] * 3


def test_linear() -> None:
    assert values(Linear.Params(end_step=10, final=0.2), 0, 5, 9, 10, 11, 1000) == pytest.approx(
        [1.0, 0.6, 0.28, 0.2, 0.2, 0.2]
    )


def test_polynomial() -> None:
    assert values(Polynomial.Params(end_step=4, power=2.0), 0, 1, 2, 3, 4, 5) == pytest.approx(
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    )


def test_cosine() -> None:
    expected = [1.0, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1, 0.1]
    assert values(Cosine.Params(end_step=8, final=0.1), 0, 2, 4, 8, 100) == pytest.approx(expected)


def test_inverse_sqrt_under_a_warm_up_is_the_transformers() -> None:
    """Against d^-0.5 min(n^-0.5, n w^-1.5) of the paper, n = step + 1, over its peak."""
    warmup = 4000
    schedule = Warmup.Params(num_steps=warmup, schedule=InverseSqrt.Params()).instantiate()
    for step in (0, 1, 1999, 3998, 3999, 4000, 4001, 15_999, 99_999):
        n = step + 1
        paper = 512**-0.5 * min(n**-0.5, n * warmup**-1.5)
        peak = 512**-0.5 * warmup**-0.5
        assert schedule(step) == pytest.approx(paper / peak, rel=1e-12)
    assert schedule(3999) == 1.0


def test_inverse_sqrt_with_a_timescale_is_t5s() -> None:
    schedule = InverseSqrt.Params(timescale=10_000).instantiate()
    for n in (1, 9_999, 10_000, 10_001, 250_000):
        assert 0.01 * schedule(n - 1) == pytest.approx(1 / math.sqrt(max(n, 10_000)), rel=1e-12)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay(shape: str, middle: float) -> None:
    decay = WarmupStableDecay.Params(decay_start=100, end_step=120, shape=shape, final=0.1)
    got = values(Warmup.Params(num_steps=10, schedule=decay), 0, 9, 10, 99, 100, 110, 120, 500)
    assert got == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0, 0.1 + 0.9 * middle, 0.1, 0.1])


def test_warm_up_starts_the_other_schedule_where_it_ends() -> None:
    cosine = Warmup.Params(num_steps=4, initial=0.2, schedule=Cosine.Params(end_step=12))
    assert values(cosine, 0, 1, 2, 3, 4, 8, 12) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 0.5, 0.0])


def test_warm_up_of_no_steps_is_the_other_schedule() -> None:
    linear = Linear.Params(end_step=7)
    assert values(Warmup.Params(num_steps=0, schedule=linear), *range(9)) == values(linear, *range(9))


def test_piecewise_constant() -> None:
    p = Piecewise.Params(
        boundaries=(3, 5),
        schedules=(Constant.Params(), Constant.Params(value=0.5), Constant.Params(value=0.1)),
    )
    assert values(p, 0, 2, 3, 4, 5, 6) == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


def test_piecewise_starts_each_piece_at_its_boundary_and_scales_it() -> None:
    p = Piecewise.Params(
        boundaries=(10,),
        schedules=(Linear.Params(end_step=10, final=0.5), Linear.Params(end_step=20)),
        scales=(1.0, 0.5),
    )
    assert values(p, 0, 5, 9, 10, 15, 20) == pytest.approx([1.0, 0.75, 0.55, 0.5, 0.25, 0.0])


def test_warm_up_of_a_piecewise_does_not_move_its_boundaries() -> None:
    pieces = Piecewise.Params(boundaries=(6,), schedules=(Constant.Params(), Constant.Params(value=0.5)))
    assert values(Warmup.Params(num_steps=2, schedule=pieces), 0, 1, 5, 6) == [0.5, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (Linear.Params(end_step=0), "end_step: must be at least 1, but is 0"),
        (Polynomial.Params(end_step=1, power=0.0), "power: must be positive"),
        (Warmup.Params(num_steps=-1), "num_steps: must be at least 0"),
        (WarmupStableDecay.Params(decay_start=5, end_step=4), r"end_step: must be at least decay_start \(5\)"),
        (InverseSqrt.Params(timescale=0), "timescale: must be at least 1"),
        (Piecewise.Params(boundaries=(3,), schedules=(Constant.Params(),)), "schedules: must be one more"),
        (
            Piecewise.Params(boundaries=(3, 3), schedules=(Constant.Params(),) * 3),
            r"boundaries: must increase from above 0, but are \(3, 3\)",
        ),
        (
            Piecewise.Params(boundaries=(3,), schedules=(Constant.Params(),) * 2, scales=(1.0,)),
            "scales: must be empty or one a schedule",
        ),
    ],
)
def test_bad_params_are_reported(p: Schedule.Params, text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        p.instantiate()


@given(step=st.integers(0, 10**7), warmup=st.integers(0, 10**5), end=st.integers(1, 10**6))
def test_multipliers_stay_within_zero_and_one(step: int, warmup: int, end: int) -> None:
    decays: tuple[Schedule.Params, ...] = (
        Cosine.Params(end_step=end),
        Linear.Params(end_step=end),
        InverseSqrt.Params(),
        WarmupStableDecay.Params(decay_start=end // 2, end_step=end),
    )
    for decay in decays:
        assert 0.0 <= Warmup.Params(num_steps=warmup, schedule=decay).instantiate()(step) <= 1.0
