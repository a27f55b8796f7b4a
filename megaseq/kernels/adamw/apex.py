"""The AdamW of NVIDIA apex, where its compiled extension is there.

What is asked for is the extension, `amp_C`, and the one function of it that is called; never a package called `apex`:
the one of that name on the public index is something else.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaseq.base import optional
from megaseq.base.errors import MissingPackageError
from megaseq.kernels.adamw.settings import AdamWSettings

EXTENSION = "amp_C"
FUNCTION = "multi_tensor_adam_capturable"
CHUNK = 2048 * 32
"""Elements that a thread block updates: the number that apex itself passes."""
DECOUPLED = 1
"""apex's number for AdamW; 0 adds the decay to the gradient."""


@functools.cache
def missing() -> str | None:
    """Why it cannot run, as the end of "..., and"; None where it can."""
    if importlib.util.find_spec(EXTENSION) is None:
        return f"NVIDIA apex is not installed with its extension {EXTENSION}"
    try:
        extension = optional(EXTENSION, needed_for="AdamW of apex")
    except MissingPackageError:
        return f"NVIDIA apex's extension {EXTENSION} cannot be imported; build it anew from NVIDIA's repository"
    if not hasattr(extension, FUNCTION):
        return f"{EXTENSION} has no {FUNCTION}; build a newer NVIDIA apex"
    return None


def apex_adamw_(
    parameters: Sequence[Tensor],
    *,
    gradients: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    settings: AdamWSettings,
    step: Tensor,
    divisor: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Updates lists of tensors in a few launches, without waiting for the device.

    Args:
        parameters: fp32, of any shapes.
        gradients: of the same shapes; they are scaled in place.
        moments: of the same shapes.
        settings: with one weight decay.
        step: fp32 scalar, number of the update.
        divisor: fp32 scalar that gradients are divided by.
        skip: scalar; what is not 0 leaves all as it was.
    """
    extension: Any = optional(EXTENSION, needed_for="AdamW of apex")
    device = parameters[0].device
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    getattr(extension, FUNCTION)(
        CHUNK,
        nothing if skip is None else (skip != 0).to(torch.int32).view(1),
        [list(gradients), list(parameters), *(list(moment) for moment in moments)],
        torch.full((), settings.learning_rate, dtype=torch.float32, device=device),
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        step.to(torch.int32).view(1),
        DECOUPLED,
        1,  # With bias correction.
        settings.weight_decay,
        torch.ones(1, device=device) if divisor is None else divisor.reciprocal().view(1),
    )
