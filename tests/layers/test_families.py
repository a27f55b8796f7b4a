"""Family recipes: complete, of the published sizes, with the published first values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megaseq.layers import EncoderDecoder, families, initialize

RECIPES: dict[str, Callable[[], EncoderDecoder.Params]] = {
    "transformer": families.transformer,
    "t5": families.t5,
    "bart": families.bart,
    "mbart": families.mbart,
    "marian": families.marian,
    "m2m100": families.m2m100,
    "t5gemma": families.t5gemma,
    "switch": families.switch,
}


def size(p: EncoderDecoder.Params, *, vocabulary: int) -> int:
    """Returns the number of trained parameters, without making them."""
    p.source_vocab_size = p.target_vocab_size = vocabulary
    with torch.device("meta"):
        model = p.instantiate()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_check_and_round_trip(name: str) -> None:
    p = RECIPES[name]()
    p.source_vocab_size = p.target_vocab_size = 100
    assert p.check() == []
    assert type(p).from_text(p.to_text()) == p


def test_sizes_are_the_published_ones() -> None:
    assert size(families.t5(), vocabulary=32128) == 76_961_152  # t5-v1_1-small
    v1 = families.t5(version="1.0", hidden_dim=2048, num_heads=8, num_layers=6)
    assert size(v1, vocabulary=32128) == 60_506_624  # t5-small
    assert size(families.switch(), vocabulary=32128) == 619_339_008  # switch-base-8
    assert size(families.bart(), vocabulary=50265) == 139_420_416  # bart-base
    base = size(families.transformer(), vocabulary=37000)
    assert base == 44_140_544 + 37000 * 512  # the blocks and two final norms of the base Transformer


def test_t5_queries_start_smaller() -> None:
    p = families.t5(model_dim=128, hidden_dim=64, num_heads=2, head_dim=64, num_layers=1)
    p.source_vocab_size = p.target_vocab_size = 50
    model: EncoderDecoder = p.instantiate()
    initialize(model, seed=1)
    query, key, _ = model.encoder.layers[0].self_attention.qkv.weight.detach().split(128)
    assert float(query.std()) == pytest.approx((128 * 64) ** -0.5, rel=0.05)
    assert float(key.std()) == pytest.approx(128**-0.5, rel=0.05)
    cross = model.decoder.layers[0].cross_attention.query.weight.detach()
    assert float(cross.std()) == pytest.approx((128 * 64) ** -0.5, rel=0.05)
    assert float(model.source_embedding.weight.detach().std()) == pytest.approx(1.0, rel=0.05)


def test_first_loss_is_that_of_guessing() -> None:
    """The logits of a fresh base model are small enough that it starts near log V."""
    p = families.transformer(model_dim=64, hidden_dim=128, num_heads=4, num_layers=2)
    p.source_vocab_size = p.target_vocab_size = 500
    model: EncoderDecoder = p.instantiate()
    initialize(model, seed=1)
    model.eval()
    from megaseq.base import NestedMap

    ids = torch.randint(0, 500, (4, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.decode_hidden(NestedMap(ids=ids), memory=model.encode(NestedMap(ids=ids.flip(0))))
        loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), ids.flip(1).flatten())
    assert math.log(500) - 0.5 < float(loss) < math.log(500) + 1.5
