"""Kernels of the activations. Names: F columns of a row, `gate` what the activation reads, `up` its factor."""

from __future__ import annotations

from megaseq.kernels.triton_math import row_offsets, sigmoid, tanh
from megaseq.kernels.triton_runtime import tl, triton

GELU_SCALE = tl.constexpr(0.7978845608028654)
"""sqrt(2 / pi)."""
GELU_CUBIC = tl.constexpr(0.044715)
HALF_ROOT = tl.constexpr(0.7071067811865476)
"""sqrt(1 / 2)."""
DENSITY = tl.constexpr(0.3989422804014327)
"""1 / sqrt(2 * pi)."""


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation of x and its derivative there; the compiler drops what is not used."""
    if NAME == "relu":
        # Written so that a NaN stays one.
        y = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif NAME == "relu2":
        y = tl.where(x <= 0.0, 0.0, x * x)
        slope = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif NAME == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * HALF_ROOT))
        y = x * below
        slope = below + tl.exp(-0.5 * x * x) * x * DENSITY
    elif NAME == "gelu_tanh":
        cubic = x * x * GELU_CUBIC
        t = tanh((x + x * cubic) * GELU_SCALE)
        y = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (1.0 + 3.0 * cubic) * GELU_SCALE
    elif NAME == "silu":
        s = sigmoid(x)
        y = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif NAME == "sigmoid":
        y = sigmoid(x)
        slope = y * (1.0 - y)
    elif NAME == "tanh":
        y = tanh(x)
        slope = 1.0 - y * y
    else:
        tl.static_assert(NAME == "identity")
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def activation_kernel(
    X,
    Y,
    F,
    blocks,
    inner,
    outer_stride,
    inner_stride,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores act(gate) * up, or act(x)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    place = row_offsets(row, inner, outer_stride, inner_stride) + column
    y, _ = activated(tl.load(X + place, mask=inside, other=0.0).to(tl.float32), NAME)
    if GATED:
        y *= tl.load(X + place + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * F + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward_kernel(
    DY,
    X,
    DX,
    F,
    blocks,
    inner,
    outer_stride,
    inner_stride,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the gradient of gate and up, or of x; the activation is computed again."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    place = row_offsets(row, inner, outer_stride, inner_stride) + column
    y, slope = activated(tl.load(X + place, mask=inside, other=0.0).to(tl.float32), NAME)
    of_y = row_offsets(row, y_inner, y_outer_stride, y_inner_stride) + column
    dy = tl.load(DY + of_y, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(X + place + F, mask=inside, other=0.0).to(tl.float32)
        out = row * 2 * F + column
        tl.store(DX + out + F, (dy * y).to(DX.dtype.element_ty), mask=inside)
        dy *= up
    else:
        out = row * F + column
    tl.store(DX + out, (dy * slope).to(DX.dtype.element_ty), mask=inside)
