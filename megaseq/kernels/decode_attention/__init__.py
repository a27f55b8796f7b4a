"""Attention while decoding: one query for each hypothesis against what a cache holds. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.checks import KernelError, check_device, check_floating, check_shape, fail
from megaseq.kernels.decode_attention.cache import KeyValueCache, check_integers
from megaseq.kernels.decode_attention.op import run, traced
from megaseq.kernels.dispatch import requested

__all__ = ["KeyValueCache", "decode_attention", "wanted_for"]

_OP = "decode_attention"


def decode_attention(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attends from one token of each hypothesis to the keys of its source, or to its own (Vaswani et al. 2017).

    Keys that the hypotheses of a source share, and those that heads share, are read once for all of them. On a GPU a
    row's keys are split among processors where there are few rows, and the shares are added by their log-sum-exp.

    Args:
        query: [B, K, N, H]; it stands at the last of the row's keys.
        cache: keys and values of M heads, N a multiple of M.
        lengths: int32 or int64 [B] or [B, K], keys of each row, read on the device and bounded by the cache's capacity;
            None: the capacity.
        bias: [N, D], added to the scores: that of the newest key last, as `PositionBias.history` has it. Keys further
            away than D take the first.
        scale: factor of the scores; None: 1 / sqrt(H).
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`, before the bias.
        window: only this many of the newest keys are seen.

    Returns:
        [B, K, N, H] in the dtype of `query`; zeros for rows of length 0.

    Raises:
        KernelError: for tensors that do not fit each other, in host memory also for pages that are not there, a wanted
            gradient, or an implementation asked for in `MEGASEQ_KERNELS` that cannot run this call.
    """
    check_floating(query, op=_OP, argument="query")
    check_shape(query, op=_OP, argument="query", shape=(None, None, None, None), legend="[B, K, N, H]")
    cache.check(query)
    _check_others(query, lengths=lengths, bias=bias, soft_cap=soft_cap, window=window)
    tensors = (query, cache.key, cache.value, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise KernelError(
            f"{_OP}: must not be asked for a gradient, but is. Call it under torch.no_grad(), or train with attention."
        )
    scale = float(query.shape[3]) ** -0.5 if scale is None else scale
    # Where nothing is traced, the way through torch's dispatcher would only cost time.
    implementation = traced if torch.compiler.is_compiling() else run
    return implementation(query, cache=cache, lengths=lengths, bias=bias, scale=scale, soft_cap=soft_cap, window=window)


def wanted_for(like: Tensor) -> bool:
    """Whether a decoder whose states are like `like` should keep its caches for this op.

    So it is where Triton runs it by itself, and where `MEGASEQ_KERNELS` names the implementation to run.
    """
    asked = requested(_OP)
    if asked == "auto":
        return like.is_cuda and triton_runtime.unable(like) is None and not torch.is_autocast_enabled("cuda")
    return asked != "native"


def _check_others(
    query: Tensor, *, lengths: Tensor | None, bias: Tensor | None, soft_cap: float | None, window: int | None
) -> None:
    batch, num_hyps, num_heads, _ = query.shape
    if lengths is not None:
        shape = (batch, num_hyps) if lengths.dim() == 2 else (batch,)
        check_shape(lengths, op=_OP, argument="lengths", shape=shape, legend="[B] or [B, K]")
        check_integers(lengths, argument="lengths", query=query)
    if bias is not None:
        check_shape(bias, op=_OP, argument="bias", shape=(num_heads, None), legend="[N, D]")
        check_floating(bias, op=_OP, argument="bias")
        check_device(bias, op=_OP, argument="bias", other=query, other_name="query")
        if bias.shape[1] == 0:
            raise fail("bias", op=_OP, expected="have a column", came=0, remedy="Use None for no bias")
    if soft_cap is not None and not soft_cap > 0:
        raise fail("soft_cap", op=_OP, expected="be above 0", came=soft_cap, remedy="Use None for no cap")
    if window is not None and window < 1:
        raise fail("window", op=_OP, expected="be at least 1", came=window, remedy="Use None for no window")
