"""Which implementation applies a mask, and those that are no kernel of Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.dispatch import choose, requested
from megaseq.kernels.dropout.host import host_keep_mask, host_keep_mask_of_runs, native_apply
from megaseq.kernels.dropout.mask import MaskNumbers
from megaseq.kernels.dropout.reference import keep_mask, keep_mask_of_runs
from megaseq.kernels.rows import unfit


def chosen_for(values: Tensor, *, residual: Tensor | None) -> tuple[str, Any]:
    """The implementation that runs, and the compiled extension if it is that.

    Raises:
        KernelError: if `MEGASEQ_KERNELS` asks for an implementation that cannot run this call.
    """
    # The extension is not looked for where it is not wanted.
    wanted = values.device.type == "cpu" and requested("dropout") != "triton"
    extension = native.extension() if wanted else None
    impossible: dict[str, str] = {}
    fits = values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16)
    if extension is None or not fits:
        impossible["native"] = (
            "the compiled extension is not there" if fits else "it takes float32 or bfloat16 in host memory"
        )
    unfit_for_triton = unfit(values, residual)
    if unfit_for_triton is not None:
        impossible["triton"] = unfit_for_triton
    automatic = "reference" if "native" in impossible else "native"
    if values.device.type == "cuda" and unfit_for_triton is None:
        automatic = "triton"
    chosen = choose("dropout", automatic=automatic, impossible=impossible)
    return chosen, extension if chosen == "native" else None


def apply_mask(values: Tensor, *, numbers: MaskNumbers, extension: Any) -> Tensor:
    """Values times the mask, by the compiled extension if it is given; always new memory."""
    values = values.contiguous()
    if extension is not None:
        return native_apply(values.detach(), extension=extension, **numbers._asdict())
    kept = _kept(values, numbers=numbers)
    # Filled and not multiplied: a dropped infinity becomes 0 and not NaN.
    return (values * numbers.scale).masked_fill_(~kept.view(values.shape), 0.0)


def _kept(values: Tensor, *, numbers: MaskNumbers) -> Tensor:
    """Which elements of `values` are kept, without the extension: bool, in the order of its elements."""
    key, start, threshold, _ = numbers
    on_cpu, count = values.device.type == "cpu", values.numel()
    if isinstance(start, int):
        if on_cpu:
            return host_keep_mask(count, key=key, offset=start, threshold=threshold)
        return keep_mask(count, key=key, offset=start, threshold=threshold, device=values.device)
    width = count // max(start.numel(), 1)
    if on_cpu:
        return host_keep_mask_of_runs(start, width=width, key=key, threshold=threshold)
    return keep_mask_of_runs(start, width=width, key=key, threshold=threshold)
