# mypy: allow-untyped-defs, allow-untyped-decorators
"""Functions that several kernels share; all compute in float32."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride):
    """Where rows (int64) begin: see `megaseq.kernels.rows.Rows`."""
    return rows // inner * outer_stride + rows % inner * inner_stride


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to the last bits also near zero, where a quotient of exponentials cancels."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))
