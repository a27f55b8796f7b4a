"""The rows of a strided tensor as a kernel walks over them, so that slices are read where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; they compute in float32."""


@dataclass(frozen=True)
class Rows:
    """Rows [R, D] of a tensor [..., D]; row r begins at r // inner * outer_stride + r % inner * inner_stride."""

    tensor: Tensor
    """The memory; the elements of a row are neighbours in it."""
    count: int
    """Rows R."""
    inner: int
    """Rows that have one distance from each other, at least 1."""
    outer_stride: int
    inner_stride: int

    @property
    def walk(self) -> tuple[int, int, int]:
        """The last three, in the order in which kernels take them."""
        return self.inner, self.outer_stride, self.inner_stride


def rows_of(x: Tensor) -> Rows:
    """The rows of `x` [..., D]; it is copied only where two loops with constant strides do not reach all of them."""
    loops: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if loops and loops[-1][1] == size * stride:
            loops[-1] = (loops[-1][0] * size, stride)
        else:
            loops.append((size, stride))
    if len(loops) > 2 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return rows_of(x.contiguous())
    loops = [(1, 0)] * (2 - len(loops)) + loops
    (outer, outer_stride), (inner, inner_stride) = loops
    return Rows(x, count=outer * inner, inner=max(inner, 1), outer_stride=outer_stride, inner_stride=inner_stride)


def unfit(first: Tensor, *others: Tensor | None) -> str | None:
    """Why Triton's kernels cannot run on these tensors of one device, as the end of "..., and"; None where they can."""
    reason = triton_runtime.unable(first)
    if reason is not None:
        return reason
    for tensor in (first, *others):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return None
