"""The op of torch that runs the kernel of AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.adamw.configs import configs
from megaseq.kernels.adamw.reference import corrections, kept_factors
from megaseq.kernels.adamw.settings import AdamWSettings, Segments
from megaseq.kernels.triton_runtime import config, kind_of, on_its_device


@on_its_device
def launch(
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
    """Runs the kernel; tensors as in `adamw_`."""
    from megaseq.kernels.adamw.triton_kernels import adamw_kernel

    count = parameters.numel()
    if not count:
        return
    step_size, root = corrections(settings, step=step)
    decay = settings.weight_decay
    segments = decay if isinstance(decay, Segments) else None
    rest = 1 - settings.beta1
    tile = config("adamw", key=kind_of(gradients.dtype), default=configs()[0])
    adamw_kernel[(-(-count // tile.blocks["BLOCK"]),)](
        parameters,
        gradients,
        *moments,
        parameters if copy is None else copy,
        step_size,
        root,
        step_size if divisor is None else divisor,
        step_size if skip is None else skip,
        step_size if segments is None else segments.ends,
        step_size if segments is None else kept_factors(segments, learning_rate=settings.learning_rate),
        count,
        0 if segments is None else segments.ends.numel(),
        1.0 if isinstance(decay, Segments) else 1 - settings.learning_rate * decay,
        rest if rest < 0.5 else rest - 1,
        settings.beta2,
        1 - settings.beta2,
        settings.epsilon,
        NEAR=rest < 0.5,
        HAS_COPY=copy is not None,
        HAS_DIVISOR=divisor is not None,
        HAS_SKIP=skip is not None,
        SEGMENTED=segments is not None,
        # Results are the reference's only if each product is rounded.
        **tile.arguments(fused=False),
    )


@torch.library.custom_op("megaseq::adamw", mutates_args={"parameters", "first", "second", "copy"})
def triton_adamw_(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    step: Tensor,
    divisor: Tensor | None,
    skip: Tensor | None,
    ends: Tensor | None,
    decays: Tensor | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """`adamw_` with its settings spelled out."""
    decay = weight_decay if ends is None or decays is None else Segments(ends, decays)
    launch(
        parameters,
        gradients=gradients,
        moments=(first, second),
        settings=AdamWSettings(learning_rate, beta1, beta2, epsilon, decay),
        step=step,
        divisor=divisor,
        skip=skip,
        copy=copy,
    )


@triton_adamw_.register_fake
def _nothing(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    step: Tensor,
    divisor: Tensor | None,
    skip: Tensor | None,
    ends: Tensor | None,
    decays: Tensor | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    return None
