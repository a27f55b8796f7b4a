"""Params of known model families; each function returns what its paper or its checkpoints have, at a given size."""

from __future__ import annotations

from typing import Any, Literal

from megaseq.layers.activations import ActivationName
from megaseq.layers.attention import Attention, CrossAttention, SelfAttention
from megaseq.layers.embedding import Embedding
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.initializers import Gaussian, ScaledGaussian
from megaseq.layers.linear import Linear
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.norm import RMSNorm
from megaseq.layers.positions import LearnedPositions, SinusoidalPositions
from megaseq.layers.relative import BucketedBias
from megaseq.layers.rotary import Rotary
from megaseq.layers.routing import Router
from megaseq.layers.transformer import Decoder, Encoder, TransformerLayer


def stacks(
    *,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_decoder_layers: int | None = None,
    activation: ActivationName = "relu",
    gated: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Returns `encoder` and `decoder` params of like layers.

    Args:
        num_layers: of the encoder, and of the decoder unless it has its own number.
        num_heads: of every attention.
        hidden_dim: of every feed-forward block.
        num_decoder_layers: of the decoder.
        activation: of every feed-forward block.
        gated: whether feed-forward blocks are gated.
        shared: params that both stacks have: `norm`, `residual`, `dropout`, `positions` and so on.
    """
    ffn = FeedForward.Params(hidden_dim=hidden_dim, activation=activation, gated=gated)
    attention = SelfAttention.Params(num_heads=num_heads)
    encoder = TransformerLayer.Params(self_attention=attention, ffn=ffn)
    decoder = encoder.replace(cross_attention=CrossAttention.Params(num_heads=num_heads))
    return {
        "encoder": Encoder.Params(num_layers=num_layers, layer=encoder, **shared),
        "decoder": Decoder.Params(num_layers=num_decoder_layers or num_layers, layer=decoder, **shared),
    }


def transformer(
    *,
    model_dim: int = 512,
    hidden_dim: int = 2048,
    num_heads: int = 8,
    num_layers: int = 6,
    num_decoder_layers: int | None = None,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """The base Transformer (Vaswani et al. 2017) with the norms before the blocks and one embedding for all."""
    sides = stacks(
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        dropout=dropout,
        positions=SinusoidalPositions.Params(),
    )
    embedding = Embedding.Params(scale_by_sqrt_dim=True)
    return EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, **sides)


def t5(
    *,
    version: Literal["1.0", "1.1", "umt5"] = "1.1",
    model_dim: int = 512,
    hidden_dim: int = 1024,
    num_heads: int = 6,
    head_dim: int = 64,
    num_layers: int = 8,
    num_decoder_layers: int | None = None,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """T5 (Raffel et al. 2020); defaults are the sizes of the small v1.1.

    Args:
        version: `1.0`, with ReLU and a shared, scaled softmax; `1.1` (FLAN, mT5, ByT5), with gated GELU and a softmax
            of its own; `umt5`, which is `1.1` with a position bias in every layer.
        model_dim: width D.
        hidden_dim: width of the feed-forward blocks.
        num_heads: heads of every attention.
        head_dim: width of a head; heads together need not be D wide.
        num_layers: of the encoder, and of the decoder unless it has its own number.
        num_decoder_layers: of the decoder.
        dropout: everywhere.
    """
    first = version == "1.0"
    bias = BucketedBias.Params(init=Gaussian.Params(std=model_dim**-0.5))
    sides = stacks(
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        activation="relu" if first else "gelu_new",
        gated=not first,
        norm=RMSNorm.Params(),
        bias=False,
        dropout=dropout,
        output_dropout=True,
        attention_dropout=dropout,
        activation_dropout=dropout,
        position_bias=None if version == "umt5" else bias,
    )
    embedding = Embedding.Params(init=Gaussian.Params(std=1.0))
    head = None if first else Embedding.Params(init=Gaussian.Params(std=1.0 if version == "umt5" else model_dim**-0.5))
    p = EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, head=head, scale_output=first, **sides)
    for _, linear in p.find(Linear):
        linear.init = ScaledGaussian.Params()
    # Scores are not scaled, so that queries start smaller by the factor that others divide by.
    query, plain = ScaledGaussian.Params(gain=head_dim**-0.5), ScaledGaussian.Params()
    for _, attention in p.find(Attention):
        attention.scale, attention.head_dim = 1.0, head_dim
    for _, block in p.find(SelfAttention):
        block.qkv.part_inits = (query, plain, plain)
        block.position_bias = bias if version == "umt5" else None
    for _, cross in p.find(CrossAttention):
        cross.query.init = query
    return p


def bart(
    *,
    model_dim: int = 768,
    hidden_dim: int = 3072,
    num_heads: int = 12,
    num_layers: int = 6,
    num_decoder_layers: int | None = None,
    max_positions: int = 1024,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """BART (Lewis et al. 2020): norms after the sums, normed embeddings, learned positions from 2; base size."""
    sides = stacks(
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        activation="gelu",
        residual="post",
        input_norm=True,
        dropout=dropout,
        positions=LearnedPositions.Params(max_positions=max_positions, offset=2),
    )
    return _gaussian(EncoderDecoder.Params(model_dim=model_dim, logits_bias="buffer", **sides))


def mbart(
    *,
    model_dim: int = 1024,
    hidden_dim: int = 4096,
    num_heads: int = 16,
    num_layers: int = 12,
    num_decoder_layers: int | None = None,
    max_positions: int = 1024,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """mBART (Liu et al. 2020): BART with the norms before the blocks, a final norm, scaled embeddings; large size."""
    p = bart(
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        max_positions=max_positions,
        dropout=dropout,
    )
    p.encoder.residual = p.decoder.residual = "pre"
    p.source_embedding.scale_by_sqrt_dim = True
    return p


def marian(
    *,
    model_dim: int = 512,
    hidden_dim: int = 2048,
    num_heads: int = 8,
    num_layers: int = 6,
    num_decoder_layers: int | None = None,
    separate_vocabularies: bool = False,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """Marian as in OPUS-MT (Tiedemann and Thottingal 2020): norms after the sums, swish, sines then cosines.

    Args:
        model_dim: width D.
        hidden_dim: width of the feed-forward blocks.
        num_heads: heads of every attention.
        num_layers: of the encoder, and of the decoder unless it has its own number.
        num_decoder_layers: of the decoder.
        separate_vocabularies: whether source and target have embeddings of their own; the softmax shares the target's.
        dropout: of embeddings and branches.
    """
    sides = stacks(
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        activation="swish",
        residual="post",
        dropout=dropout,
        positions=SinusoidalPositions.Params(layout="half_split"),
    )
    embedding = Embedding.Params(scale_by_sqrt_dim=True)
    p = EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, logits_bias="buffer", **sides)
    p.target_embedding = embedding if separate_vocabularies else None
    return _gaussian(p)


def m2m100(
    *,
    model_dim: int = 1024,
    hidden_dim: int = 4096,
    num_heads: int = 16,
    num_layers: int = 12,
    num_decoder_layers: int | None = None,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """M2M-100 (Fan et al. 2021), also NLLB: norms before the blocks, sines then cosines from 2, none for padding."""
    sides = stacks(
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        dropout=dropout,
        positions=SinusoidalPositions.Params(layout="half_split", endpoint=True, offset=2, zero_padding=True),
    )
    embedding = Embedding.Params(scale_by_sqrt_dim=True)
    return _gaussian(EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, **sides))


def t5gemma(
    *,
    model_dim: int = 2304,
    hidden_dim: int = 9216,
    num_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 256,
    num_layers: int = 26,
    window: int = 4096,
    dropout: float = 0.0,
) -> EncoderDecoder.Params:
    """T5Gemma (Zhang et al. 2025): Gemma 2 layers, every other with a sliding window; sizes of the 2b-2b."""
    sides = stacks(
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        activation="gelu_tanh",
        gated=True,
        norm=RMSNorm.Params(add_one=True),
        residual="sandwich",
        bias=False,
        dropout=dropout,
        output_dropout=True,
        attention_dropout=dropout,
        activation_dropout=dropout,
    )
    embedding = Embedding.Params(scale_by_sqrt_dim=True)
    p = EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, logits_soft_cap=30.0, **sides)
    p.target_embedding = embedding
    for _, attention in p.find(Attention):
        attention.num_key_value_heads, attention.head_dim, attention.soft_cap = num_key_value_heads, head_dim, 50.0
    for _, block in p.find(SelfAttention):
        block.rotary = Rotary.Params()
    for index in range(0, num_layers, 2):
        # Gemma's causal window counts the query itself; T5Gemma's two-sided one counts the places on each side.
        p.encoder.set(f"layers.{index}.self_attention.window", window + 1)
        p.decoder.set(f"layers.{index}.self_attention.window", window)
    return _gaussian(p)


def switch(
    *,
    model_dim: int = 768,
    hidden_dim: int = 3072,
    num_heads: int = 12,
    head_dim: int = 64,
    num_layers: int = 12,
    num_experts: int = 8,
    capacity_factor: float = 1.25,
    dropout: float = 0.1,
) -> EncoderDecoder.Params:
    """The Switch Transformer (Fedus et al. 2021): T5 1.0 with experts in every second layer; sizes of switch-base-8."""
    p = t5(
        version="1.0",
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        dropout=dropout,
    )
    router = Router.Params(method="top1", capacity_factor=capacity_factor, z_loss=0.0, jitter=0.01)
    for stack in (p.encoder, p.decoder):
        add_experts(stack, num_experts=num_experts, router=router)
    return p


def add_experts(
    stack: Encoder.Params | Decoder.Params, *, num_experts: int, router: Router.Params, every: int = 2
) -> None:
    """Puts a mixture of experts, each like the block it replaces, into the last of every `every` layers of `stack`."""
    for index in range(every - 1, stack.num_layers, every):
        block = stack.layers.get(str(index), stack.layer).ffn
        alike = {name: getattr(block, name) for name in ("hidden_dim", "activation", "gated", "up", "down")}
        mixture = MixtureOfExperts.Params(num_experts=num_experts, router=router, **alike)
        stack.set(f"layers.{index}.ffn", mixture)


def _gaussian(p: EncoderDecoder.Params) -> EncoderDecoder.Params:
    """Gives every matrix normal first values with deviation 0.02, as BART and its descendants have; returns `p`."""
    init = Gaussian.Params(std=0.02)
    for _, linear in p.find(Linear):
        linear.init = init
    for _, embedding in p.find(Embedding):
        embedding.init = init
    return p
