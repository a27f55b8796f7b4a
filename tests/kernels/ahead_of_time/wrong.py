"""Kernels that do not compile, or not to what they should: one for each check."""

from __future__ import annotations

import torch

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.triton_runtime import tl, triton
from tests.kernels.ahead_of_time.right import doubled, products


@triton.jit
def changes_its_type(X, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(count):
        total = total.to(tl.float32) + step
    tl.store(X + tl.arange(0, BLOCK), total)


@triton.jit
def holds_too_much(X, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(X + lanes)
    tl.store(X + lanes, x / tl.sum(x, 0))


def held(block: int) -> None:
    holds_too_much[(1,)](torch.zeros(block), BLOCK=block, num_warps=1, maxnreg=32)


def mistyped() -> None:
    changes_its_type[(1,)](torch.zeros(64), 5, BLOCK=64)


def compile_cases() -> list[CompileCase]:
    """All of them."""
    return [
        CompileCase("nothing", lambda: None),
        CompileCase("mistyped", mistyped),
        CompileCase("large", lambda: products(torch.bfloat16, block=128, num_stages=8)),
        CompileCase("spills", lambda: held(2048)),
        CompileCase("no_tensor_cores", lambda: products(torch.float32, block=16), tensor_cores=("multiply",)),
        # Right: what follows a failure is looked at too.
        CompileCase("elementwise", lambda: doubled(torch.float16)),
    ]
