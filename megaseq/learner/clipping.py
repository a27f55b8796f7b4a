"""The norm of the whole gradient, and the factor that limits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SquaredNormReduction = Callable[[Tensor], Tensor]
"""Takes this rank's sum of squares, a float64 scalar tensor, and returns the sum over all ranks that hold a share."""

CountedViews = Callable[[str, Tensor], Sequence[Tensor]]
"""Takes a parameter's path and its gradient; returns the parts of it that this rank counts in the norm: what several
ranks hold counts once."""


def global_norm(
    gradients: Sequence[Tensor],
    *,
    reduce: SquaredNormReduction | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Returns the Euclidean norm over all elements of all `gradients`.

    The norm of each tensor is taken in its own precision and their squares are summed in float64, so the result does
    not depend on how many tensors there are. It is the one host synchronisation of an update.

    Args:
        gradients: Tensors of any shapes on one device.
        reduce: Sums the squared norm over ranks, when gradients are sharded.
        device: Where `reduce` wants the sum of a rank that has no gradients.

    Returns:
        The norm; nan or inf when any element is, which is how a non-finite gradient is found without another pass.
    """
    if gradients:
        norms: Sequence[Tensor] = torch._foreach_norm(list(gradients))
        squared = torch.stack(list(norms)).to(torch.float64).square().sum()
    else:
        squared = torch.zeros((), dtype=torch.float64, device=device)
    if reduce is not None:
        squared = reduce(squared)
    return float(squared.sqrt())


def clip_coefficient(norm: float, *, limit: float | None) -> float:
    """Returns min(1, limit / norm): the factor that brings a gradient of this `norm` within `limit` (None: no limit).

    Pascanu et al., 2013, "On the difficulty of training recurrent neural networks".
    """
    if limit is None or norm <= limit:
        return 1.0
    return limit / norm
