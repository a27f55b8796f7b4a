"""One update by AdamW of a flat run of parameters: moments, weights and their copy in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.adamw.apex import missing
from megaseq.kernels.adamw.reference import reference_adamw_
from megaseq.kernels.adamw.settings import AdamWSettings, Segments
from megaseq.kernels.checks import check_device, check_shape, fail
from megaseq.kernels.dispatch import choose

__all__ = ["AdamWSettings", "Segments", "adamw_", "choose_adamw"]

_OP = "adamw"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def adamw_(
    parameters: Tensor,
    *,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: AdamWSettings,
    step: Tensor,
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Updates fp32 parameters in place, with gradient g = gradients / divisor at update t = `step`:

    p -= r w p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p -= r (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon).

    The rounding is that of torch's fused AdamW in host memory. Nothing waits for the device: what is known only there,
    such as whether the gradient is finite, comes as scalars in its memory. It has no gradient of its own.

    Args:
        parameters: fp32 [n], contiguous.
        gradients: [n], contiguous, fp32, bf16 or fp16; not changed.
        moments: m and v, fp32 [n], contiguous; changed in place.
        settings: rates and decays; weight decay by segment where it is `Segments`.
        step: fp32 scalar tensor, 1 for the first update.
        divisor: fp32 scalar tensor; None is 1. Normalisation times clipping, turned over.
        skip: scalar tensor; what is not 0 leaves everything as it was. A skipped update must not count in `step`.
        copy: bf16 or fp16 [n], contiguous: gets the new parameters, rounded.

    Raises:
        KernelError: for tensors that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that cannot run.
    """
    _check(parameters, gradients=gradients, moments=moments, settings=settings, copy=copy)
    for name, scalar in (("step", step), ("divisor", divisor), ("skip", skip)):
        if scalar is not None:
            _check_scalar(scalar, argument=name, device=parameters)
    elsewhere = "it is the learner's, for lists of tensors"
    reasons = {"torch": elsewhere, "apex": elsewhere}
    reason = triton_runtime.unable(parameters)
    if reason is not None:
        reasons["triton"] = reason
    on_gpu = parameters.device.type == "cuda" and reason is None
    with torch.no_grad():
        if choose(_OP, automatic="triton" if on_gpu else "reference", impossible=reasons) == "triton":
            _run_triton(
                parameters, gradients, moments=moments, settings=settings, scalars=(step, divisor, skip), copy=copy
            )
            return
        reference_adamw_(
            parameters,
            gradients=gradients,
            moments=moments,
            settings=settings,
            step=step,
            divisor=divisor,
            skip=skip,
            copy=copy,
        )


def choose_adamw(tensor: Tensor, *, flat: bool) -> str:
    """What updates a group of parameters: "torch" (its fused kernel for lists), "apex", "triton" or "reference".

    On a GPU `auto` takes NVIDIA apex where its extension is installed, or else Triton where parameters are one flat
    run, as ZeRO's shares are, and torch's fused kernel for lists of tensors, which it updates in a few launches;
    Triton would make one for each tensor. In host memory it takes torch's.

    Args:
        tensor: one of the parameters.
        flat: whether they are one flat run of memory.

    Raises:
        KernelError: if `MEGASEQ_KERNELS` asks for an implementation that cannot run here.
    """
    reasons: dict[str, str] = {}
    on_gpu = tensor.device.type == "cuda"
    absent = missing() if on_gpu else "it runs on a GPU"
    if absent is not None:
        reasons["apex"] = absent
    unable = triton_runtime.unable(tensor)
    if unable is not None:
        reasons["triton"] = unable
    if tensor.dtype is not torch.float32:
        reasons |= dict.fromkeys(("apex", "triton", "reference"), "it takes float32 parameters")
    preferred = ("apex", "triton", "torch") if flat else ("apex", "torch")
    automatic = next(name for name in preferred if name not in reasons) if on_gpu else "torch"
    return choose(_OP, automatic=automatic, impossible=reasons)


def _run_triton(
    parameters: Tensor,
    gradients: Tensor,
    *,
    moments: tuple[Tensor, Tensor],
    settings: AdamWSettings,
    scalars: tuple[Tensor, Tensor | None, Tensor | None],
    copy: Tensor | None,
) -> None:
    from megaseq.kernels.adamw.op import triton_adamw_

    decay = settings.weight_decay
    segments = decay if isinstance(decay, Segments) else None
    triton_adamw_(
        parameters,
        gradients,
        *moments,
        copy,
        *scalars,
        None if segments is None else segments.ends,
        None if segments is None else segments.weight_decay,
        settings.learning_rate,
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        0.0 if isinstance(decay, Segments) else decay,
    )


def _check(
    parameters: Tensor,
    *,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: AdamWSettings,
    copy: Tensor | None,
) -> None:
    """Checks the large tensors.

    Raises:
        KernelError: at the first one that does not fit.
    """
    exact = (torch.float32,)
    tensors = [("parameters", parameters, exact), ("gradients", gradients, _FLOATS)]
    tensors += [(f"moments[{index}]", moment, exact) for index, moment in enumerate(moments)]
    if copy is not None:
        tensors.append(("copy", copy, _FLOATS[1:]))
    for name, tensor, dtypes in tensors:
        if tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise fail(name, op=_OP, expected=f"be {kinds}", came=tensor.dtype, remedy="Keep fp32 masters")
        check_shape(tensor, op=_OP, argument=name, shape=(parameters.numel(),), legend="[n]")
        check_device(tensor, op=_OP, argument=name, other=parameters, other_name="parameters")
        if not tensor.is_contiguous():
            raise fail(name, op=_OP, expected="be contiguous", came=f"of stride {tensor.stride(0)}", remedy="Copy it")
    decay = settings.weight_decay
    if isinstance(decay, Segments):
        check_shape(decay.ends, op=_OP, argument="ends", shape=(None,), legend="[G]")
        check_shape(decay.weight_decay, op=_OP, argument="weight_decay", shape=tuple(decay.ends.shape), legend="[G]")
        check_device(decay.ends, op=_OP, argument="ends", other=parameters, other_name="parameters")
        check_device(decay.weight_decay, op=_OP, argument="weight_decay", other=parameters, other_name="parameters")
        if decay.ends.dtype is not torch.int64 or decay.weight_decay.dtype is not torch.float32:
            raise fail(
                "weight_decay",
                op=_OP,
                expected="be int64 ends and float32 decays",
                came=f"{decay.ends.dtype} and {decay.weight_decay.dtype}",
                remedy="Cast them",
            )


def _check_scalar(scalar: Tensor, *, argument: str, device: Tensor) -> None:
    if scalar.numel() != 1:
        raise fail(argument, op=_OP, expected="be one number", came=list(scalar.shape), remedy="Give a scalar tensor")
    if argument != "skip" and scalar.dtype is not torch.float32:
        raise fail(argument, op=_OP, expected="be float32", came=scalar.dtype, remedy="Cast it before the call")
    check_device(scalar, op=_OP, argument=argument, other=device, other_name="parameters")
