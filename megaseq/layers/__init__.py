"""The layer zoo: what an encoder-decoder Transformer of any known family is made of."""

from __future__ import annotations

from megaseq.layers.attention import CrossAttention, SelfAttention
from megaseq.layers.base import Layer, StepContext, bind, initialize
from megaseq.layers.embedding import Embedding
from megaseq.layers.encoder_decoder import EncoderDecoder, SoftmaxWeights
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.linear import Linear
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.norm import LayerNorm, Norm, RMSNorm
from megaseq.layers.positions import LearnedPositions, Positions, SinusoidalPositions
from megaseq.layers.relative import Alibi, BucketedBias, PositionBias
from megaseq.layers.rotary import Rotary
from megaseq.layers.routing import Router
from megaseq.layers.transformer import Decoder, Encoder, Stack, TransformerLayer

__all__ = [
    "Alibi",
    "BucketedBias",
    "CrossAttention",
    "Decoder",
    "Embedding",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MixtureOfExperts",
    "Norm",
    "PositionBias",
    "Positions",
    "RMSNorm",
    "Rotary",
    "Router",
    "SelfAttention",
    "SinusoidalPositions",
    "SoftmaxWeights",
    "Stack",
    "StepContext",
    "TransformerLayer",
    "bind",
    "initialize",
]
