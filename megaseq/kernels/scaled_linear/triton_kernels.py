"""Kernel of `scaled_linear`. Names: X rows [M, K], W weight [N, K], XS and WS their scales, `m`, `n`, `k` places there.

A program computes a tile [BLOCK_M, BLOCK_N] of the result. Neighbouring programs share rows of the weight: GROUP tiles
of rows are walked through before the next columns.
"""

from __future__ import annotations

from megaseq.kernels.activation.triton_kernels import activated
from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def scaled_linear_kernel(
    X,
    W,
    XS,
    WS,
    BIAS,
    Y,
    M,
    N,
    K,
    x_stride_m,
    x_stride_k,
    w_stride_n,
    w_stride_k,
    xs_stride_m,
    xs_stride_s,
    ws_stride_n,
    ws_stride_s,
    x_block,
    w_block,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_BLOCKED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Stores act((X W^T) * XS * WS + BIAS). BLOCKED: a row has several scales, each of blocks that BLOCK_K divides.

    EVEN: BLOCK_K divides K. e4m3 is accumulated in full fp32 from one step of K to the next; tensor cores alone would
    keep 14 bits.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * tiles_n)
    rows_of_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    m = (group * GROUP + within % rows_of_group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // rows_of_group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at = X + m[:, None] * x_stride_m + k[None, :] * x_stride_k
    w_at = W + n[:, None] * w_stride_n + k[None, :] * w_stride_k
    x_step, w_step = tl.cast(x_stride_k, tl.int64) * BLOCK_K, tl.cast(w_stride_k, tl.int64) * BLOCK_K

    exact: tl.constexpr = INTEGER and not (X_BLOCKED or W_BLOCKED)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if exact else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            x = tl.load(x_at, mask=in_m[:, None], other=0.0)
            w = tl.load(w_at, mask=in_n[:, None], other=0.0)
        else:
            in_k = k < K - start
            x = tl.load(x_at, mask=in_m[:, None] & in_k[None, :], other=0.0)
            w = tl.load(w_at, mask=in_n[:, None] & in_k[None, :], other=0.0)
        x_at += x_step
        w_at += w_step
        if X_BLOCKED or W_BLOCKED:
            part = tl.dot(x, tl.trans(w), out_dtype=tl.int32 if INTEGER else tl.float32).to(tl.float32)
            if X_BLOCKED:
                part *= tl.load(XS + m * xs_stride_m + (start // x_block) * xs_stride_s, mask=in_m, other=0.0)[:, None]
            if W_BLOCKED:
                part *= tl.load(WS + n * ws_stride_n + (start // w_block) * ws_stride_s, mask=in_n, other=0.0)[None, :]
            total += part
        elif INTEGER:
            total = tl.dot(x, tl.trans(w), total, out_dtype=tl.int32)
        else:
            total = tl.dot(x, tl.trans(w), total, max_num_imprecise_acc=BLOCK_K)

    y = total.to(tl.float32)
    if not X_BLOCKED:
        y *= tl.load(XS + m * xs_stride_m, mask=in_m, other=0.0)[:, None]
    if not W_BLOCKED:
        y *= tl.load(WS + n * ws_stride_n, mask=in_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y, _ = activated(y, ACTIVATION)
    tl.store(Y + m[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
