"""Which implementation of `scaled_linear` can run a call, and which one `auto` takes."""

from __future__ import annotations

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.quantize.formats import Quantized
from megaseq.kernels.scaled_linear.configs import NARROWEST

ALIGNED = 16
"""What K and N are multiples of for torch's product of e4m3 on a GPU."""
SCALES_ROWS_IN_HOST_MEMORY = torch.__version__ >= "2.12"
"""Whether torch's product of e4m3 in host memory takes a scale a row; that of torch 2.11 stops at an assertion."""


def impossible(x: Quantized, *, weight: Quantized, activation: str, dtype: torch.dtype) -> dict[str, str]:
    """The implementations that cannot run a call, each with the reason as the end of "..., and".

    Args:
        x: rows [M, K].
        weight: [N, K].
        activation: its name.
        dtype: of the result.
    """
    integer = x.values.dtype is torch.int8
    on_gpu = _on_gpu(x)
    (num_rows, width), num_columns = x.values.shape, weight.values.shape[0]
    blocks = [operand.block for operand in (x, weight) if operand.scales.shape[1] > 1]
    reasons: dict[str, str] = {}
    reason = triton_runtime.unable(x.values)
    if reason is None and not integer and on_gpu and _capability(x) < (8, 9):
        reason = "this GPU has no 8-bit floats (they need sm_89 or later); quantise to int8"
    if reason is None and any(block % NARROWEST for block in blocks):
        reason = f"its blocks are multiples of {NARROWEST}; quantise with block=128"
    if reason is not None:
        reasons["triton"] = reason
    if not integer:
        reasons["int_mm"] = "it takes int8"
    elif len(set(blocks)) > 1:
        reasons["int_mm"] = "it takes blocks of one size"
    elif on_gpu and (blocks or num_rows <= 16 or width % 8 or num_columns % 8):
        reasons["int_mm"] = "on a GPU it takes one scale a row, more than 16 rows, and widths that 8 divides"
    if integer or blocks:
        reasons["scaled_mm"] = "it takes e4m3 with one scale a row"
    elif dtype is not torch.bfloat16 or activation != "identity":
        reasons["scaled_mm"] = "it gives bfloat16 and has no activation"
    elif on_gpu and _capability(x) < (9, 0):
        reasons["scaled_mm"] = "scales of rows need sm_90 or later"
    elif width % ALIGNED or num_columns % ALIGNED:
        reasons["scaled_mm"] = f"it takes widths that {ALIGNED} divides"
    elif not on_gpu and not SCALES_ROWS_IN_HOST_MEMORY:
        reasons["scaled_mm"] = "in host memory scales of rows need torch 2.12 or later"
    return reasons


def automatic(x: Quantized, *, bias_dtype: torch.dtype | None, reasons: dict[str, str]) -> str:
    """The implementation that `auto` takes.

    In host memory: int8 by torch's exact product in integers, which is 3 to 5 times as fast as fp32 at any M; e4m3 in
    fp32, as no processor multiplies it and torch's own product is 2 to 60 times slower than that. On a GPU: Triton;
    but on sm_90, for 64 rows or more, rowwise e4m3 without an activation goes to torch's own CUTLASS kernel, which is
    made for this case. Where Triton cannot run: torch's products, in fp32 at the last.

    Args:
        x: rows [M, K].
        bias_dtype: None is no bias.
        reasons: from `impossible`.
    """
    if not _on_gpu(x):
        return "fp32" if "int_mm" in reasons else "int_mm"
    fits = "scaled_mm" not in reasons and bias_dtype in (None, torch.bfloat16)
    if fits and _capability(x)[0] == 9 and x.values.shape[0] >= 64:
        return "scaled_mm"
    return next(name for name in ("triton", "int_mm", "fp32") if name not in reasons)


def _capability(x: Quantized) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.values.device)


def _on_gpu(x: Quantized) -> bool:
    return x.values.device.type == "cuda"
