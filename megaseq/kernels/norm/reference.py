"""Norms in plain torch, step by step: the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.norm.settings import NormKind


def reference_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Returns `x` [..., D] normalised, in its dtype; computes in float32, or float64 for float64."""
    return precise_norm(x, weight=weight, bias=bias, kind=kind).to(x.dtype)


def precise_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """The same, not yet rounded."""
    precise = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(precise)
    if kind.centred:
        centred = centred - centred.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + kind.eps)
    factor = weight.to(precise) + 1.0 if kind.add_one else weight.to(precise)
    return normed * factor if bias is None else normed * factor + bias.to(precise)
