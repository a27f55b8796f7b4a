"""Params of known model families; each function returns what its paper or its checkpoints have, at a given size."""

from __future__ import annotations

from typing import Any

from megaseq.layers.activations import ActivationName
from megaseq.layers.attention import CrossAttention, SelfAttention
from megaseq.layers.embedding import Embedding
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.initializers import Gaussian
from megaseq.layers.norm import LayerNorm, RMSNorm
from megaseq.layers.positions import LearnedPositions, SinusoidalPositions
from megaseq.layers.relative import BucketedBias
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
        num_layers=num_layers, num_decoder_layers=num_decoder_layers, num_heads=num_heads, hidden_dim=hidden_dim,
        dropout=dropout, positions=SinusoidalPositions.Params(),
    )
    embedding = Embedding.Params(scale_by_sqrt_dim=True)
    return EncoderDecoder.Params(model_dim=model_dim, source_embedding=embedding, **sides)
