"""Rotary positions in plain torch: the truth, and what runs in host memory."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_rotate(x: Tensor, *, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """`rotate` step by step; shapes as there."""
    width = cosines.shape[-1]
    if cosines.dtype is not x.dtype or sines.dtype is not x.dtype:
        cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    whole = width == x.shape[-1]
    turned = x if whole else x[..., :width]
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    turned = turned * cosines + partner * sines
    return turned if whole else torch.cat([turned, x[..., width:]], dim=-1)
