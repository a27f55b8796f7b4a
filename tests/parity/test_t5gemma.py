"""T5Gemma: sandwich norms, rotary positions, grouped heads, soft caps and sliding windows against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base import NestedMap
from megaseq.layers import EncoderDecoder, families
from tests.parity import mapping
from tests.parity.test_families import Pair, batch, random_weights

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Our model and theirs."""
    side: dict[str, Any] = {
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "attn_logit_softcapping": 50.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    module = transformers.T5GemmaModuleConfig
    config = transformers.T5GemmaConfig(
        encoder=module(**side), decoder=module(**side), vocab_size=41, attn_implementation="eager"
    )
    theirs = random_weights(transformers.T5GemmaForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:  # these are multiplied by one more than their weight
                parameter -= 1.0
    p = families.t5gemma(
        model_dim=16, hidden_dim=24, num_heads=4, num_key_value_heads=2, head_dim=6, num_layers=3, window=5
    )
    p.source_vocab_size = p.target_vocab_size = 41
    model: EncoderDecoder = p.instantiate()
    mapping.load(model, weights=mapping.t5gemma(theirs))
    return model.eval(), theirs


@torch.no_grad()
def test_logits_are_theirs(pair: Pair) -> None:
    """Full forward with padded sources: every logit within 1e-5."""
    ours, theirs = pair
    source, mask, target = batch()
    expected = theirs(
        input_ids=source,
        attention_mask=mask,
        decoder_input_ids=target,
        decoder_attention_mask=torch.ones_like(target),
    ).logits
    memory = ours.encode(NestedMap(ids=source, segment_ids=mask))
    logits = ours.logits(ours.decode_hidden(NestedMap(ids=target), memory=memory))
    assert float(logits.std()) > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_are_the_full_forward(pair: Pair) -> None:
    """Token by token gives what the whole target gives, past the window's end."""
    ours, _ = pair
    source, mask, target = batch(seed=4)
    side = NestedMap(ids=source, segment_ids=mask)
    full = ours.logits(ours.decode_hidden(NestedMap(ids=target), memory=ours.encode(side)))
    state = ours.prefill(side)
    for place in range(target.shape[1]):
        logits, state = ours.step(state, tokens=target[:, place])
        torch.testing.assert_close(logits, full[:, place], rtol=1e-5, atol=1e-5)
