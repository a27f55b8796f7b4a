"""AdamW in plain torch: the rounding of every step is that of torch's fused kernel for host memory, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.adamw.settings import AdamWSettings, Segments


def reference_adamw_(
    parameters: Tensor,
    *,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: AdamWSettings,
    step: Tensor,
    divisor: Tensor | None,
    skip: Tensor | None,
    copy: Tensor | None,
) -> None:
    """`adamw_` step by step; shapes as there."""
    first, second = moments
    step_size, root = corrections(settings, step=step)
    g = gradients.float()
    if divisor is not None:
        g = g / divisor
    m = torch.lerp(first, g, 1 - settings.beta1)
    v = (second * settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    # The root in fp32 would be off by an ulp here and there.
    denominator = v.double().sqrt().float() / root + settings.epsilon
    p = parameters * _kept(settings, count=parameters.numel(), device=parameters.device)
    p = p + (-step_size * m) / denominator
    for target, value in ((parameters, p), (first, m), (second, v)):
        target.copy_(value if skip is None else torch.where(skip != 0, target, value))
    if copy is not None:
        copy.copy_(parameters if skip is None else torch.where(skip != 0, copy.float(), parameters))


def corrections(settings: AdamWSettings, *, step: Tensor) -> tuple[Tensor, Tensor]:
    """Returns learning rate / (1 - beta1^step) and sqrt(1 - beta2^step), fp32 scalars on the device of `step`."""
    exact = step.double()
    step_size = settings.learning_rate / (1 - settings.beta1**exact)
    return step_size.float(), (1 - settings.beta2**exact).sqrt().float()


def kept_factors(segments: Segments, *, learning_rate: float) -> Tensor:
    """Returns what weight decay leaves of the parameters of each segment: fp32 [G]."""
    return (1 - learning_rate * segments.weight_decay.double()).float()


def _kept(settings: AdamWSettings, *, count: int, device: torch.device) -> Tensor | float:
    decay = settings.weight_decay
    if not isinstance(decay, Segments):
        return 1 - settings.learning_rate * decay
    index = torch.searchsorted(decay.ends, torch.arange(count, device=device), right=True)
    return kept_factors(decay, learning_rate=settings.learning_rate)[index]
