"""Our families against transformers' models with the same random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megaseq.base import NestedMap
from megaseq.layers import EncoderDecoder, families
from tests.parity import mapping

transformers = pytest.importorskip("transformers")

VOCABULARY = 41
PAD = 1


def random_weights(model: nn.Module) -> nn.Module:
    """Gives every parameter and the logits' bias values at which mistakes show; returns `model` in eval mode."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # Marian's fixed sinusoids
            continue
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.15 if parameter.dim() == 1 or "bias" in name else parameter.shape[-1] ** -0.5
        parameter.data = values * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    return model.eval()


def bart_config(kind: str, **other: Any) -> Any:
    """Returns a tiny config of a family that has BART's names."""
    return getattr(transformers, kind)(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        **other,
    )


SIZES: dict[str, Any] = {"model_dim": 16, "hidden_dim": 24, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}

Pair = tuple[EncoderDecoder, nn.Module]


def pair_of(p: EncoderDecoder.Params, *, theirs: nn.Module, names: Callable[[nn.Module], mapping.Weights]) -> Pair:
    """Returns our model with the weights of `theirs`, and `theirs`."""
    random_weights(theirs)
    p.source_vocab_size = VOCABULARY
    p.target_vocab_size = getattr(theirs.config, "decoder_vocab_size", None) or VOCABULARY
    model: EncoderDecoder = p.instantiate()
    mapping.load(model, weights=names(theirs))
    return model.eval(), theirs


def make_t5(version: str) -> Pair:
    """T5 v1.0, v1.1 or UMT5; heads together are wider than the model."""
    gated = version != "1.0"
    config_class = transformers.UMT5Config if version == "umt5" else transformers.T5Config
    model_class = (
        transformers.UMT5ForConditionalGeneration if version == "umt5" else transformers.T5ForConditionalGeneration
    )
    config = config_class(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        pad_token_id=PAD,
    )
    theirs = model_class(config)
    if gated:  # version 5 of transformers ties whatever the config says; real checkpoints of these bring their own
        theirs.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        theirs.config.tie_word_embeddings = False
    p = families.t5(version=version, head_dim=6, **SIZES)  # type: ignore[arg-type]
    for stack in (p.encoder, p.decoder):
        for holder in (stack, stack.layer.self_attention):
            if holder.position_bias is not None:
                holder.position_bias.num_buckets, holder.position_bias.max_distance = 8, 12

    def names(model: nn.Module) -> mapping.Weights:
        return mapping.t5(model, per_layer_bias=version == "umt5", head=gated)

    return pair_of(p, theirs=theirs, names=names)


def make_bart() -> Pair:
    """BART."""
    theirs = transformers.BartForConditionalGeneration(bart_config("BartConfig"))
    return pair_of(families.bart(max_positions=32, **SIZES), theirs=theirs, names=mapping.bart)


def make_mbart() -> Pair:
    """mBART."""
    theirs = transformers.MBartForConditionalGeneration(bart_config("MBartConfig", scale_embedding=True))
    return pair_of(families.mbart(max_positions=32, **SIZES), theirs=theirs, names=mapping.bart)


def make_marian() -> Pair:
    """Marian with one vocabulary."""
    config = bart_config("MarianConfig", scale_embedding=True, activation_function="swish")
    return pair_of(families.marian(**SIZES), theirs=transformers.MarianMTModel(config), names=mapping.bart)


def make_marian_separate() -> Pair:
    """Marian with a vocabulary for each side."""
    config = bart_config(
        "MarianConfig",
        scale_embedding=True,
        activation_function="swish",
        share_encoder_decoder_embeddings=False,
        decoder_vocab_size=VOCABULARY + 6,
    )
    p = families.marian(separate_vocabularies=True, **SIZES)
    return pair_of(p, theirs=transformers.MarianMTModel(config), names=mapping.bart)


def make_m2m100() -> Pair:
    """M2M100."""
    config = bart_config("M2M100Config", scale_embedding=True)
    return pair_of(
        families.m2m100(**SIZES), theirs=transformers.M2M100ForConditionalGeneration(config), names=mapping.bart
    )


MAKERS: dict[str, Callable[[], Pair]] = {
    "t5-1.0": lambda: make_t5("1.0"),
    "t5-1.1": lambda: make_t5("1.1"),
    "umt5": lambda: make_t5("umt5"),
    "bart": make_bart,
    "mbart": make_mbart,
    "marian": make_marian,
    "marian-separate": make_marian_separate,
    "m2m100": make_m2m100,
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Our model and theirs."""
    return MAKERS[request.param]()


def batch(*, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns source ids [3, 19] and mask with padding at the end, and target ids [3, 17]."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, VOCABULARY, (3, 19), generator=generator)
    mask = torch.arange(19)[None] < torch.tensor([19, 11, 4])[:, None]
    target = torch.randint(4, VOCABULARY, (3, 17), generator=generator)
    return source.masked_fill(~mask, PAD), mask.long(), target


@torch.no_grad()
def test_logits_are_theirs(pair: Pair) -> None:
    """Full forward with padded sources: every logit within 1e-5."""
    ours, theirs = pair
    source, mask, target = batch()
    expected = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    memory = ours.encode(NestedMap(ids=source, segment_ids=mask))
    logits = ours.logits(ours.decode_hidden(NestedMap(ids=target), memory=memory))
    assert logits.shape == expected.shape
    assert float(logits.std()) > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_are_the_full_forward(pair: Pair) -> None:
    """Token by token, with padded sources, gives what the whole target gives."""
    ours, _ = pair
    source, mask, target = batch(seed=4)
    side = NestedMap(ids=source, segment_ids=mask)
    full = ours.logits(ours.decode_hidden(NestedMap(ids=target), memory=ours.encode(side)))
    state = ours.prefill(side)
    for place in range(target.shape[1]):
        logits, state = ours.step(state, tokens=target[:, place])
        torch.testing.assert_close(logits, full[:, place], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_of_the_target_changes_nothing(pair: Pair) -> None:
    """Logits at real places are the same when a target is padded."""
    ours, _ = pair
    source, mask, target = batch(seed=5)
    memory = ours.encode(NestedMap(ids=source, segment_ids=mask))
    short = ours.logits(ours.decode_hidden(NestedMap(ids=target[:, :9]), memory=memory))
    segment_ids = (torch.arange(17)[None] < 9).long().expand(3, 17)
    padded = target.masked_fill(segment_ids == 0, PAD)
    long = ours.logits(ours.decode_hidden(NestedMap(ids=padded, segment_ids=segment_ids), memory=memory))
    torch.testing.assert_close(long[:, :9], short, rtol=1e-5, atol=1e-5)
