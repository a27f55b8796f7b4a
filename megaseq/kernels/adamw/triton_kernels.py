"""Kernel of AdamW. Names: P parameters, G gradients, M and V moments, n their number, `kept` 1 - rate * weight decay.

All that is fused into one rounding is written as `fma`, and the launch forbids more of it: results are the reference's.
"""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def _kept_of(places, ENDS, FACTORS, first, last, num_segments):
    """Factor of each of the elements `first` to `last`, by the segment that it lies in."""
    low, high = 0, num_segments - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(ENDS + middle) > first:
            high = middle
        else:
            low = middle + 1
    kept = tl.full(places.shape, 0.0, tl.float32) + tl.load(FACTORS + low)
    end = tl.load(ENDS + low)
    while (end < last) & (low < num_segments - 1):
        low += 1
        kept = tl.where(places >= end, tl.load(FACTORS + low), kept)
        end = tl.load(ENDS + low)
    return kept


@triton.jit
def adamw_kernel(
    P,
    G,
    M,
    V,
    COPY,
    STEP_SIZE,
    ROOT,
    DIVISOR,
    SKIP,
    ENDS,
    FACTORS,
    n,
    num_segments,
    kept,
    towards_gradient,
    beta2,
    rest2,
    epsilon,
    NEAR: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates BLOCK elements. `towards_gradient` is 1 - beta1; if not NEAR, that is, from 0.5 on, -beta1."""
    if HAS_SKIP:  # noqa: SIM102 - what is not compiled in must not be loaded
        if tl.load(SKIP) != 0:
            return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    places = first + tl.arange(0, BLOCK)
    inside = places < n
    g = tl.load(G + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        g = tl.div_rn(g, tl.load(DIVISOR))
    m = tl.load(M + places, mask=inside, other=0.0)
    m = tl.fma(towards_gradient, g - m, m if NEAR else g)
    tl.store(M + places, m, mask=inside)
    v = tl.fma(rest2 * g, g, tl.load(V + places, mask=inside, other=0.0) * beta2)
    tl.store(V + places, v, mask=inside)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(ROOT)) + epsilon
    p = tl.load(P + places, mask=inside, other=0.0)
    if SEGMENTED:
        p *= _kept_of(places, ENDS, FACTORS, first, first + BLOCK, num_segments)
    else:
        p *= kept
    p += tl.div_rn(-tl.load(STEP_SIZE) * m, denominator)
    tl.store(P + places, p, mask=inside)
    if HAS_COPY:
        tl.store(COPY + places, p.to(COPY.dtype.element_ty), mask=inside)
