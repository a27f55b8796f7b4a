"""Linear maps of groups of rows in plain torch: what every other implementation must compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def reference_grouped_linear(x: Tensor, *, weight: Tensor, counts: list[int]) -> Tensor:
    """Returns `x_g W_g^T` for each group g of rows.

    Args:
        x: [A, D], the rows of the first group first.
        weight: [G, F, D].
        counts: rows of each group, A together.

    Returns:
        [A, F].
    """
    # The matrix of an empty group takes part too: it gets a gradient, of zero.
    groups = zip(torch.split(x, counts), weight.unbind(0), strict=True)
    return torch.cat([functional.linear(rows, matrix) for rows, matrix in groups])
