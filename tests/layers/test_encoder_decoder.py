"""The whole model's switches: widths, depths, exceptions, sharing, logits, precision."""

from __future__ import annotations

import pytest
import torch

from megaseq.base import NestedMap, ParamsError
from megaseq.layers import (
    Embedding,
    EncoderDecoder,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    bind,
    families,
    initialize,
)

SOURCE = NestedMap(
    ids=torch.tensor([[5, 6, 7, 8], [9, 10, 3, 0]]), segment_ids=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
)
TARGET = NestedMap(ids=torch.tensor([[2, 11, 12], [2, 13, 14]]))


def tiny() -> EncoderDecoder.Params:
    """Returns params of a tiny Transformer."""
    p = families.transformer(model_dim=16, hidden_dim=20, num_heads=2, num_layers=2)
    p.source_vocab_size = p.target_vocab_size = 23
    return p


def made(p: EncoderDecoder.Params) -> EncoderDecoder:
    """Returns the model with first values, in eval mode."""
    model: EncoderDecoder = p.instantiate()
    initialize(model, seed=1)
    bind(model, seed=1)
    return model.eval()


def logits(model: EncoderDecoder) -> torch.Tensor:
    """Returns the logits of the fixed batch."""
    return model.logits(model.decode_hidden(TARGET, memory=model.encode(SOURCE)))


@torch.no_grad()
def steps_agree(model: EncoderDecoder, *, tolerance: float = 1e-5) -> None:
    """Checks that decoding by steps gives `logits`."""
    expected, state = logits(model), model.prefill(SOURCE)
    for place in range(3):
        got, state = model.step(state, tokens=TARGET.ids[:, place])
        torch.testing.assert_close(got, expected[:, place], rtol=tolerance, atol=tolerance)


def test_encoder_and_decoder_may_differ_in_depth_and_width() -> None:
    p = tiny()
    p.encoder.model_dim, p.encoder.num_layers, p.target_embedding = 24, 5, Embedding.Params()
    p.encoder.layer.self_attention.num_heads = 3
    p.target_vocab_size = 31
    model = made(p)
    assert logits(model).shape == (2, 3, 31)
    assert model.decoder.layers[0].cross_attention.key_value.weight.shape == (32, 24)
    assert len(model.encoder.layers) == 5
    steps_agree(model)


def test_one_layer_may_differ_from_the_others() -> None:
    p = tiny()
    p.set("decoder.layers.1.ffn.hidden_dim", 44)
    p.set("decoder.layers.1.self_attention.num_key_value_heads", 1)
    model = made(p)
    widths = [layer.ffn.up.weight.shape[0] for layer in model.decoder.layers]
    assert widths == [20, 44]
    assert [layer.self_attention.key_dim for layer in model.decoder.layers] == [16, 8]
    steps_agree(model)


@pytest.mark.parametrize("style", ["pre", "post", "sandwich"])
def test_residual_styles_place_the_norms(style: str) -> None:
    p = FeedForward.Params(hidden_dim=7, model_dim=6, norm=LayerNorm.Params(), residual=style, dropout=0.0, bias=True)  # type: ignore[arg-type]
    block: FeedForward = p.replace(activation_dropout=0.0).instantiate()
    initialize(block, seed=1)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))

    def inner(y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = block.down(torch.relu(block.up(y)))
        return out

    expected = {
        "pre": lambda: x + inner(block.norm(x)),
        "post": lambda: block.norm(x + inner(x)),
        "sandwich": lambda: x + block.post_norm(inner(block.norm(x))),  # type: ignore[misc]
    }[style]()
    torch.testing.assert_close(block(x), expected)
    p2 = tiny()
    p2.encoder.residual = p2.decoder.residual = style  # type: ignore[assignment]
    model = made(p2)
    assert (model.encoder.final_norm is None) is (style == "post")
    steps_agree(model)


def test_gated_feed_forward_is_one_matrix_product() -> None:
    p = FeedForward.Params(hidden_dim=7, model_dim=6, norm=RMSNorm.Params(), residual="pre", dropout=0.0, bias=False)
    block: FeedForward = p.replace(activation_dropout=0.0, gated=True, activation="gelu_tanh").instantiate()
    initialize(block, seed=1)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    gate, up = block.up.weight.split(7)
    y = block.norm(x)
    hidden = torch.nn.functional.gelu(y @ gate.T, approximate="tanh") * (y @ up.T)
    torch.testing.assert_close(block(x), x + hidden @ block.down.weight.T)


def test_a_fused_projection_may_have_biases_in_some_parts() -> None:
    """Whisper's keys have no bias."""
    linear: Linear = Linear.Params(input_dim=3, output_dim=8, bias=(True, False, True)).instantiate(
        axes=("heads", "model"), parts=(4, 2, 2)
    )
    initialize(linear, seed=1)
    assert linear.bias is not None and linear.bias.shape == (6,)
    linear.bias.data = torch.arange(1.0, 7.0)
    assert linear(torch.zeros(3)).tolist() == [1, 2, 3, 4, 0, 0, 5, 6]
    with pytest.raises(ParamsError, match="bias: must be one flag or 3 flags"):
        Linear.Params(input_dim=3, output_dim=8, bias=(True, False)).instantiate(
            axes=("heads", "model"), parts=(4, 2, 2)
        )


@pytest.mark.parametrize("sharing", ["all", "output", "inputs", "none"])
def test_sharing_of_embeddings(sharing: str) -> None:
    p = tiny()
    p.target_embedding = Embedding.Params() if sharing in ("output", "none") else None
    p.head = Embedding.Params() if sharing in ("inputs", "none") else None
    model = made(p)
    matrices = [name for name, _ in model.named_parameters() if "embedding" in name or "head" in name]
    assert len(matrices) == {"all": 1, "output": 2, "inputs": 2, "none": 3}[sharing]
    owner = {"all": model.source_embedding, "output": model.target_embedding}.get(sharing, model.head)
    assert owner is not None and model.softmax_weights().weight is owner.weight
    steps_agree(model)


@torch.no_grad()
def test_logits_are_scaled_biased_and_capped() -> None:
    p = tiny()
    p.scale_output, p.logits_bias, p.logits_soft_cap = True, "parameter", 2.0
    model = made(p)
    bias = model.logits_bias
    assert bias is not None
    bias.copy_(torch.arange(23.0) / 5)
    hidden = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    raw = (hidden / 4) @ model.source_embedding.weight.T + bias
    torch.testing.assert_close(model.logits(hidden), 2 * torch.tanh(raw / 2))
    weight, got, scale, cap = model.softmax_weights()
    assert got is bias and scale == 0.25 and cap == 2.0 and weight is model.source_embedding.weight


def test_a_fixed_bias_is_stored_but_not_trained() -> None:
    p = tiny()
    p.logits_bias = "buffer"
    model = made(p)
    assert "logits_bias" in model.state_dict()
    assert "logits_bias" not in dict(model.named_parameters())


def test_bfloat16_is_close_and_steps_agree() -> None:
    model = made(tiny())
    full = logits(model).detach()
    half = made(tiny()).to(torch.bfloat16)
    got = logits(half).detach()
    assert got.dtype == torch.bfloat16
    assert float((got.float() - full).abs().max()) < 0.1 * float(full.abs().max())
    steps_agree(half, tolerance=0.05)


def test_autocast_trains() -> None:
    model = made(tiny()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logits(model).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_widths_that_do_not_fit_are_refused_together() -> None:
    p = tiny()
    p.encoder.model_dim = 24
    p.encoder.layer.self_attention.num_key_value_heads = 3
    p.target_vocab_size = 40
    problems = "\n".join(str(problem) for problem in p.check())
    assert "target_embedding: must be set when decoder.model_dim (16) is not encoder.model_dim (24)" in problems
    assert "target_vocab_size (40) is not source_vocab_size (23)" in problems
    assert "encoder.layer.self_attention.num_key_value_heads: must divide num_heads (2), but is 3" in problems


def test_exceptions_for_layers_that_are_not_there_are_refused() -> None:
    p = tiny()
    p.set("encoder.layers.2.ffn.hidden_dim", 3)
    assert any("layers.2: must be an index from 0 to 1" in str(problem) for problem in p.check())


def test_every_parameter_gets_a_gradient() -> None:
    model = made(tiny()).train()
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_selecting_no_source_leaves_nothing() -> None:
    model = made(tiny())
    state = model.prefill(SOURCE)
    _, state = model.step(state, tokens=torch.tensor([2, 2]))
    none = torch.zeros(0, dtype=torch.long)
    state = model.select(state, sources=none, hyps=none.view(0, 4))
    assert state.num_sources == 0
