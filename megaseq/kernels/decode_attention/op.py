"""Which implementation runs, and the op as torch sees it: one name under which it is traced, compiled and exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.checks import KernelError
from megaseq.kernels.decode_attention import configs, host
from megaseq.kernels.decode_attention.cache import KeyValueCache
from megaseq.kernels.decode_attention.reference import reference_decode_attention
from megaseq.kernels.dispatch import choose
from megaseq.kernels.functions import without_autocast


def run(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> Tensor:
    """`decode_attention` after its checks, by the implementation that is chosen."""
    impossible = {}
    reason = _unable(query)
    if reason is not None:
        impossible["triton"] = reason
    reason = host.unfit(query, cache=cache, lengths=lengths, bias=bias, soft_cap=soft_cap, window=window)
    if reason is not None:
        impossible["native"] = reason
    automatic = "reference"
    if query.is_cuda and "triton" not in impossible:
        automatic = "triton"
    elif "native" not in impossible:
        automatic = "native"
    chosen = choose("decode_attention", automatic=automatic, impossible=impossible)
    if chosen == "native":
        return host.native_decode_attention(query, cache=cache, lengths=lengths, bias=bias, scale=scale, window=window)
    implementation: Callable[..., Tensor] = reference_decode_attention
    if chosen == "triton":
        from megaseq.kernels.decode_attention.launch import triton_decode_attention as implementation
    with without_autocast(query.device):
        return implementation(
            query, cache=cache, lengths=lengths, bias=bias, scale=scale, soft_cap=soft_cap, window=window
        )


def _unable(query: Tensor) -> str | None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "its kernels take float32, bfloat16 and float16"
    if query.shape[3] > configs.MAX_WIDTH:
        return f"its kernels take heads of a width up to {configs.MAX_WIDTH}"
    return triton_runtime.unable(query)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? table, Tensor? lengths, Tensor? bias, Tensor? key_scale, "
    "Tensor? value_scale, float scale, float? soft_cap, SymInt? window) -> Tensor"
)


@torch.library.custom_op("megaseq::decode_attention", mutates_args=(), schema=_SCHEMA)
def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> Tensor:
    cache = KeyValueCache(key, value, table, key_scale, value_scale)
    return run(query, cache=cache, lengths=lengths, bias=bias, scale=scale, soft_cap=soft_cap, window=window)


@_decode_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _no_gradient(_: Any, *__: Tensor) -> None:
    raise KernelError(
        "decode_attention: must not be asked for a gradient, but is. Call it under torch.no_grad(), or train with "
        "attention."
    )


_decode_attention.register_autograd(_no_gradient)


def traced(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> Tensor:
    """`run` as one op of a graph."""
    result: Tensor = _decode_attention(
        query, cache.key, cache.value, cache.table, lengths, bias, cache.key_scale, cache.value_scale, scale, soft_cap,
        window,
    )  # fmt: skip
    return result
