"""The operations that cost time: one folder each, with the reference beside every faster implementation."""

from __future__ import annotations

from megaseq.kernels.attention import AttentionMask, RelativeBias, attention, attention_with_log_sum
from megaseq.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from megaseq.kernels.dropout import DropoutMask, dropout, dropout_add

__all__ = [
    "AttentionMask",
    "CrossEntropy",
    "DropoutMask",
    "RelativeBias",
    "attention",
    "attention_with_log_sum",
    "dropout",
    "dropout_add",
    "linear_cross_entropy",
]
