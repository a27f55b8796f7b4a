"""Projection, softmax and cross entropy in plain torch: the truth, with all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums


def reference_cross_entropy(
    hidden: Tensor, *, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, settings: CrossEntropy
) -> LossSums:
    """`linear_cross_entropy` step by step; shapes as there."""
    logits = torch.nn.functional.linear(hidden * settings.scale, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if settings.soft_cap is not None:
        logits = settings.soft_cap * torch.tanh(logits / settings.soft_cap)
    weights = weights.to(logits.dtype)
    normaliser = torch.logsumexp(logits, dim=-1)
    of_label = logits.gather(1, labels[:, None])[:, 0]
    nll = normaliser - of_label
    smoothing = settings.label_smoothing
    loss = (1 - smoothing) * nll + smoothing * (normaliser - logits.mean(dim=-1))
    loss = loss + settings.z_loss * normaliser.square()
    correct = of_label >= logits.amax(dim=-1)
    return LossSums(
        loss=(loss * weights).sum(),
        nll=(nll.detach() * weights).sum(),
        correct=(correct * weights).sum(),
        z_loss=(settings.z_loss * normaliser.detach().square() * weights).sum(),
        weight=weights.sum(),
    )
