"""Linear maps of groups of rows, each group by its own matrix: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.checks import check_device, check_floating, check_like, check_shape, fail
from megaseq.kernels.dispatch import choose
from megaseq.kernels.functions import autocast_on
from megaseq.kernels.grouped_linear.reference import reference_grouped_linear

__all__ = ["grouped_linear"]

BYTES = 16
"""Rows of what the grouped product reads are multiples of this."""


def grouped_linear(x: Tensor, *, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiplies each group of rows by its own matrix, without padding groups to one length.

    Args:
        x: [A, D], the rows of the first group first.
        weight: [G, F, D], a matrix for each group, in the dtype of `x` unless autocast is on.
        counts: rows of each group, A together; groups may be empty.

    Returns:
        [A, F]: `x_g W_g^T` for each group g.

    Raises:
        KernelError: for shapes, dtypes, devices or counts that do not fit, or if `MEGASEQ_KERNELS` asks for an
            implementation that cannot run.
    """
    op = "grouped_linear"
    check_floating(x, op=op, argument="x")
    check_shape(x, op=op, argument="x", shape=(None, None), legend="[A, D]")
    check_shape(weight, op=op, argument="weight", shape=(len(counts), None, x.shape[1]), legend="[G, F, D]")
    check_device(weight, op=op, argument="weight", other=x, other_name="x")
    # Autocast makes the dtypes one.
    if not autocast_on(x.device):
        check_like(weight, op=op, argument="weight", other=x, other_name="x")
    if any(count < 0 for count in counts):
        raise fail("counts", op=op, expected="be at least 0", came=min(counts), remedy="Count the rows of each group")
    if sum(counts) != x.shape[0]:
        raise fail(
            "counts",
            op=op,
            expected=f"add up to the {x.shape[0]} rows",
            came=sum(counts),
            remedy="Count the rows of each group",
        )
    reasons: dict[str, str] = {}
    widths = (x.shape[1] * x.element_size(), weight.shape[1] * x.element_size())
    if x.dtype not in (torch.bfloat16, torch.float32) or (x.is_cuda and x.dtype is not torch.bfloat16):
        reasons["grouped_mm"] = "it takes bfloat16, in host memory also float32"
    elif any(width % BYTES for width in widths) or not x.shape[0]:
        reasons["grouped_mm"] = f"it takes at least one row, and widths of a multiple of {BYTES} bytes"
    # In host memory it is a loop over groups, as the reference is.
    automatic = "grouped_mm" if x.is_cuda and "grouped_mm" not in reasons else "reference"
    if choose(op, automatic=automatic, impossible=reasons) == "grouped_mm":
        ends = torch.tensor(list(counts), device=x.device).cumsum(0).to(torch.int32)
        return functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return reference_grouped_linear(x, weight=weight, counts=list(counts))
