"""Small kernels that compile and fit."""

from __future__ import annotations

import torch

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def multiply(A, B, C, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, SIZE, BLOCK):
        a = tl.load(A + rows[:, None] * SIZE + start + rows[None, :])
        b = tl.load(B + (start + rows)[:, None] * SIZE + rows[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(C + rows[:, None] * SIZE + rows[None, :], total)


@triton.jit
def twice(X, Y, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes, mask=lanes < count, other=0.0).to(tl.float32)
    tl.store(Y + lanes, (x * 2).to(Y.dtype.element_ty), mask=lanes < count)


def products(dtype: torch.dtype, *, block: int, **options: int) -> None:
    a, c = torch.zeros(512, 512, dtype=dtype), torch.zeros(512, 512)
    multiply[(1,)](a, a, c, SIZE=512, BLOCK=block, PRECISION="ieee", **options)


def doubled(dtype: torch.dtype) -> None:
    x = torch.zeros(100, dtype=dtype)
    twice[(1,)](x, x, 100, BLOCK=128)
    twice[(1,)](x, x, 100, BLOCK=128)  # The same kernel again is one row.
    twice[(1,)](x, x, 100, BLOCK=256)


def compile_cases() -> list[CompileCase]:
    """All of them."""
    return [
        CompileCase("bf16", lambda: products(torch.bfloat16, block=64), tensor_cores=("multiply",)),
        CompileCase("elementwise", lambda: doubled(torch.float32)),
        CompileCase("fp8", lambda: doubled(torch.float8_e4m3fn), minimum_architecture=89),
    ]
