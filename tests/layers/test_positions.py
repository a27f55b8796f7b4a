"""Absolute, rotary and relative positions against formulas written out one element at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import ParamsError
from megaseq.layers import Alibi, BucketedBias, LearnedPositions, Rotary, SinusoidalPositions, initialize
from megaseq.layers.relative import PositionBias, alibi_slopes

PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])


def dense_of(bias: PositionBias, *, length: int) -> torch.Tensor:
    """The bias [1, N, T, T] that an attention without a table of distances is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASEQ_KERNELS", "reference")
        dense = bias(length, device=torch.device("cpu"))
    assert isinstance(dense, torch.Tensor)
    return dense


def table(positions: SinusoidalPositions, *, length: int, dim: int) -> torch.Tensor:
    """Returns the first `length` positions."""
    return positions(torch.zeros(1, length, dim), positions=torch.arange(length)[None])[0]


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("offset", [0, 2])
def test_interleaved_sinusoids(dim: int, offset: int) -> None:
    got = table(SinusoidalPositions.Params(model_dim=dim, offset=offset).instantiate(), length=300, dim=dim)
    for place in (0, 1, 17, 299):
        for i in range(dim):
            angle = (place + offset) / 10000 ** (2 * (i // 2) / dim)
            assert float(got[place, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


def test_half_split_sinusoids_with_endpoint() -> None:
    p = SinusoidalPositions.Params(model_dim=10, layout="half_split", endpoint=True, max_timescale=500.0)
    got = table(p.instantiate(), length=40, dim=10)
    for place in (0, 3, 39):
        for i in range(5):
            angle = place / 500.0 ** (i / 4)
            assert float(got[place, i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(got[place, 5 + i]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_padding_gets_zeros_when_asked() -> None:
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])
    for zero in (False, True):
        positions = SinusoidalPositions.Params(model_dim=6, zero_padding=zero).instantiate()
        out = positions(torch.ones(1, 8, 6), positions=PLACES, segment_ids=segment_ids)
        assert torch.equal(out[0, 7], torch.ones(6)) is zero
        assert torch.equal(out[0, 1], out[0, 4])


def test_learned_positions_start_at_their_offset() -> None:
    positions = LearnedPositions.Params(model_dim=4, max_positions=8, offset=2).instantiate()
    initialize(positions, seed=1)
    out = positions(torch.zeros(1, 8, 4), positions=PLACES)
    assert torch.equal(out[0, 3], positions.weight[2]) and torch.equal(out[0, 6], positions.weight[5])
    assert torch.equal(positions.at(3, like=out), positions.weight[5])


def test_too_long_a_sequence_is_refused() -> None:
    positions = LearnedPositions.Params(model_dim=4, max_positions=3).instantiate()
    with pytest.raises(ParamsError, match=r"must cover the longest sequence, but is 3\. Raise it to 4"):
        positions(torch.zeros(1, 8, 4), positions=PLACES)
    short = LearnedPositions.Params(model_dim=4, max_positions=4).instantiate()
    assert short(torch.zeros(1, 8, 4), positions=PLACES).shape == (1, 8, 4)  # a packed row longer than the table


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_turns_pairs(layout: str, fraction: float) -> None:
    rotary: Rotary = Rotary.Params(head_dim=8, theta=100.0, fraction=fraction, layout=layout).instantiate()  # type: ignore[arg-type]
    x = torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(1))
    got = rotary(x, rotation=rotary.rotation(PLACES))
    width = int(8 * fraction)
    expected = x.clone()
    for t in range(8):
        for i in range(width // 2):
            angle = float(PLACES[0, t]) / 100.0 ** (2 * i / width)
            first, second = (i, i + width // 2) if layout == "half_split" else (2 * i, 2 * i + 1)
            a, b = x[0, t, :, first], x[0, t, :, second]
            expected[0, t, :, first] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, t, :, second] = b * math.cos(angle) + a * math.sin(angle)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bucketed_bias_by_distance(bidirectional: bool) -> None:
    """Every pair's value is that of its distance, rows and history agree, buckets grow with the distance."""
    p = BucketedBias.Params(num_heads=3, bidirectional=bidirectional, num_buckets=8, max_distance=20)
    bias: BucketedBias = p.instantiate()
    initialize(bias, seed=1)
    square = dense_of(bias, length=30)
    assert square.shape == (1, 3, 30, 30)
    for t in (0, 7, 29):
        for s in (0, 3, 29):
            if bidirectional or s <= t:
                bucket = int(bias.buckets(torch.tensor([s - t])))
                assert torch.equal(square[0, :, t, s], bias.weight[bucket])
    assert torch.equal(bias.history(30, device=torch.device("cpu"))[0, :, 0], square[0, :, 29])
    back = bias.buckets(-torch.arange(100))
    assert bool((back.diff() >= 0).all()) and int(back.max()) == (3 if bidirectional else 7)
    ahead = bias.buckets(torch.arange(1, 100))
    assert int(ahead.min()) == (5 if bidirectional else 0) and int(ahead.max()) == (7 if bidirectional else 0)


def test_bucketed_bias_gets_gradients() -> None:
    bias: BucketedBias = BucketedBias.Params(num_heads=2, bidirectional=True).instantiate()
    initialize(bias, seed=1)
    dense_of(bias, length=5).sum().backward()
    grad = bias.weight.grad
    assert grad is not None and float(grad.sum()) == 2 * 25
    assert float(grad[0, 0]) == 5.0  # distance zero, once in each row


@settings(max_examples=60, deadline=None)
@given(
    num_buckets=st.integers(2, 24).map(lambda n: 2 * n),
    further=st.integers(1, 200),
    bidirectional=st.booleans(),
)
def test_bias_by_distance_is_that_of_every_pair(num_buckets: int, further: int, bidirectional: bool) -> None:
    """Also beyond the ends of the table, which is shorter than from the greatest distance to the greatest one."""
    max_distance = num_buckets // 2 + further
    bias: BucketedBias = BucketedBias.Params(
        num_heads=2, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    ).instantiate()
    initialize(bias, seed=1)
    short, length = bias.relative(device=torch.device("cpu")), max_distance + 5
    assert short.table is not None and short.table.shape[1] <= (2 if bidirectional else 1) * max_distance + 1
    dense = dense_of(bias, length=length)
    assert torch.equal(short.dense(query_length=length, key_length=length), dense)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(4, [2**-2, 2**-4, 2**-6, 2**-8]), (3, [2**-4, 2**-8, 2**-2]), (1, [2**-8])],
)
def test_alibi_slopes(heads: int, slopes: list[float]) -> None:
    assert alibi_slopes(heads) == pytest.approx(slopes)
    bias = dense_of(Alibi.Params(num_heads=heads, bidirectional=False).instantiate(), length=4)
    assert bias[0, :, 3, 1].tolist() == pytest.approx([-2 * slope for slope in slopes])


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ParamsError, match="fraction: must be in"):
        Rotary.Params(head_dim=8, fraction=0.0).instantiate()
    with pytest.raises(ParamsError, match="num_buckets: must be an even number"):
        BucketedBias.Params(num_heads=2, bidirectional=True, num_buckets=5).instantiate()
    with pytest.raises(ParamsError, match="max_distance: must be above half"):
        BucketedBias.Params(num_heads=2, bidirectional=True, num_buckets=32, max_distance=16).instantiate()
