"""Tensors that have a shape and no memory: what parameters are until it is known what of them lies where.

`megaseq.layers.base.parameters_without_memory` makes such parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def placeholder(shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor of this shape whose elements are all one place in memory: it is not to be read or written.

    Unlike a tensor on torch's meta device it can be given memory on any device later, by setting its `data`.
    """
    return torch.empty((), dtype=dtype).expand(tuple(shape))


def is_placeholder(tensor: Tensor) -> bool:
    """Whether `tensor` has less memory than elements."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
