"""A packed row gives what its pairs give in rows of their own, whatever the positions are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import NestedMap
from megaseq.layers import (
    Alibi,
    BucketedBias,
    EncoderDecoder,
    LearnedPositions,
    Rotary,
    SelfAttention,
    SinusoidalPositions,
    families,
    initialize,
)
from megaseq.layers.transformer import positions_of

Change = Callable[[EncoderDecoder.Params], None]


def _stacks(p: EncoderDecoder.Params, **values: object) -> None:
    for stack in (p.encoder, p.decoder):
        for name, value in values.items():
            setattr(stack, name, value)


def _attention(p: EncoderDecoder.Params, **values: object) -> None:
    for _, block in p.find(SelfAttention):
        for name, value in values.items():
            setattr(block, name, value)


CHANGES: dict[str, Change] = {
    "sinusoidal": lambda p: None,
    "padding-aware": lambda p: _stacks(
        p, positions=SinusoidalPositions.Params(layout="half_split", zero_padding=True, offset=2)
    ),
    "learned": lambda p: _stacks(p, positions=LearnedPositions.Params(max_positions=16, offset=2)),
    "none": lambda p: _stacks(p, positions=None),
    "t5-shared": lambda p: _stacks(
        p, positions=None, position_bias=BucketedBias.Params(num_buckets=8, max_distance=10)
    ),
    "t5-per-layer": lambda p: (
        _stacks(p, positions=None),
        _attention(p, position_bias=BucketedBias.Params(num_buckets=8, max_distance=10)),
    )[0],
    "alibi": lambda p: _stacks(p, positions=None, position_bias=Alibi.Params()),
    "rotary": lambda p: (_stacks(p, positions=None), _attention(p, rotary=Rotary.Params()))[0],
    "rotary-half-interleaved": lambda p: (
        _stacks(p, positions=None),
        _attention(p, rotary=Rotary.Params(fraction=0.5, layout="interleaved")),
    )[0],
    "window": lambda p: _attention(p, window=3),
    "post": lambda p: _stacks(p, residual="post", input_norm=True),
    "multi-query": lambda p: _attention(p, num_key_value_heads=1, head_dim=6),
}


def make(name: str) -> EncoderDecoder:
    """Returns a tiny model with that change, in eval mode."""
    p = families.transformer(model_dim=16, hidden_dim=20, num_heads=2, num_layers=2)
    p.source_vocab_size = p.target_vocab_size = 23
    CHANGES[name](p)
    model: EncoderDecoder = p.instantiate()
    initialize(model, seed=4)
    return model.eval()


MODELS: dict[str, EncoderDecoder] = {}


def model_of(name: str) -> EncoderDecoder:
    """Returns the model, made once."""
    if name not in MODELS:
        MODELS[name] = make(name)
    return MODELS[name]


def ids_of(length: int, *, seed: int) -> torch.Tensor:
    """Returns random tokens [1, length]."""
    return torch.randint(4, 23, (1, length), generator=torch.Generator().manual_seed(seed))


def packed(parts: list[torch.Tensor], *, width: int) -> NestedMap:
    """Puts `parts` into one row [1, width]."""
    ids = torch.zeros(1, width, dtype=torch.long)
    segment_ids, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    start = 0
    for number, part in enumerate(parts, start=1):
        stop = start + part.shape[1]
        ids[:, start:stop], segment_ids[:, start:stop] = part, number
        positions[:, start:stop] = torch.arange(part.shape[1])
        start = stop
    return NestedMap(ids=ids, segment_ids=segment_ids, positions=positions)


Lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", sorted(CHANGES))
@settings(max_examples=8, deadline=None)
@given(lengths=Lengths, extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_packed_row_is_its_pairs(
    name: str, lengths: list[tuple[int, int]], extra: tuple[int, int], seed: int
) -> None:
    model = model_of(name)
    sources = [ids_of(one, seed=seed + i) for i, (one, _) in enumerate(lengths)]
    targets = [ids_of(two, seed=seed + 50 + i) for i, (_, two) in enumerate(lengths)]
    source = packed(sources, width=sum(one for one, _ in lengths) + extra[0])
    target = packed(targets, width=sum(two for _, two in lengths) + extra[1])
    together = model.decode_hidden(target, memory=model.encode(source))
    start = 0
    for one, two in zip(sources, targets, strict=True):
        alone = model.decode_hidden(NestedMap(ids=two), memory=model.encode(NestedMap(ids=one)))
        stop = start + two.shape[1]
        torch.testing.assert_close(together[:, start:stop], alone, rtol=1e-4, atol=1e-5)
        start = stop


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), pad=st.integers(0, 4))
def test_positions_are_derived_from_segments(lengths: list[int], pad: int) -> None:
    side = packed([ids_of(length, seed=1) for length in lengths], width=sum(lengths) + pad)
    derived = positions_of(side.segment_ids)
    real = side.segment_ids > 0
    assert torch.equal(derived[real], side.positions[real])


@torch.no_grad()
def test_a_token_in_another_segment_has_no_effect() -> None:
    model = model_of("t5-shared")
    parts = [ids_of(5, seed=1), ids_of(6, seed=2)]
    target = packed([ids_of(4, seed=3), ids_of(4, seed=4)], width=8)
    one = model.decode_hidden(target, memory=model.encode(packed(parts, width=12)))
    parts[1] = (parts[1] - 3) % 19 + 4
    two = model.decode_hidden(target, memory=model.encode(packed(parts, width=12)))
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.equal(one[:, 4:], two[:, 4:])


@torch.no_grad()
def test_later_tokens_have_no_effect_on_earlier_ones() -> None:
    model = model_of("sinusoidal")
    memory = model.encode(NestedMap(ids=ids_of(5, seed=1)))
    target = ids_of(7, seed=2)
    one = model.decode_hidden(NestedMap(ids=target), memory=memory)
    target[:, 5] = (target[:, 5] - 3) % 19 + 4
    two = model.decode_hidden(NestedMap(ids=target), memory=memory)
    torch.testing.assert_close(one[:, :5], two[:, :5], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 5:], two[:, 5:])
