"""Attention and dropout as far as memory is concerned, for tensors without values: our kernels want real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megaseq.kernels.functions import apply_one
from megaseq.layers.attention import Attention
from megaseq.layers.base import Layer
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.routing import Router


def install_stand_ins(module: nn.Module) -> None:
    """Makes attentions and dropouts of `module` allocate and keep what the kernels do, and compute nothing.

    To be called before `checkpoint_activations`. An attention that the fused kernels cannot compute (it drops weights
    out, or squeezes scores) keeps the weights [B, N, T, S] as the reference does.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            object.__setattr__(part, "attend", _attend_of(part))
        if isinstance(part, Router):
            object.__setattr__(part, "forward", _route_of(part))
        if isinstance(part, MixtureOfExperts):
            object.__setattr__(part, "drop_hidden", _drop_hidden)
        if isinstance(part, Layer):
            object.__setattr__(part, "drop", _drop_of(part))
            object.__setattr__(part, "drop_add", _drop_add_of(part))


def _attend_of(attention: Attention) -> Any:
    p = attention.params
    dropped = p.attention_dropout > 0
    # Float32 softmax, its dropped copy in the values' dtype, and tanh of the scores where these are squeezed.
    stored = 0 if not dropped and p.soft_cap is None else 1 + int(dropped) + int(p.soft_cap is not None)

    def attend(query: Tensor, **options: Any) -> Tensor:
        key: Tensor = options["key"]
        return apply_one(_FusedAttention, query, key, options["value"], stored).flatten(2)

    return attend


def _route_of(router: Router) -> Any:
    p = router.params

    def route(x: Tensor, **_: Any) -> Any:
        """Sends all experts equally many tokens."""
        logits = functional.linear(x.float(), router.weight.float())
        number = min(int(x.shape[0] * x.shape[1] * router.choices), logits.numel())
        tokens = torch.empty(number, dtype=torch.int64, device=x.device)
        # On the host, where the experts read them.
        counts = torch.full((p.num_experts,), number // p.num_experts, device="cpu")
        counts[: number % p.num_experts] += 1
        gates = logits.softmax(dim=-1).flatten()[:number]
        return (tokens, tokens, gates, counts), (logits.logsumexp(dim=-1).square().sum(), {})

    return route


def _drop_hidden(hidden: Tensor, **_: Any) -> Tensor:
    return apply_one(_Mask, hidden, None)


def _drop_of(layer: Layer) -> Any:
    def drop(x: Tensor, *, rate: float, **_: Any) -> Tensor:
        return apply_one(_Mask, x, None) if layer.training and rate else x

    return drop


def _drop_add_of(layer: Layer) -> Any:
    def drop_add(x: Tensor, *, residual: Tensor, rate: float, **_: Any) -> Tensor:
        if not layer.training or not rate or x.dtype != residual.dtype:
            return residual + x
        return apply_one(_Mask, x, residual)

    return drop_add


class _Mask(torch.autograd.Function):
    """Dropout keeps nothing: its mask is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        ctx.both = residual is not None
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.empty_like(gradients[0]), gradients[0] if ctx.both else None


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, its output and a logarithm for each query (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stored: int) -> Tensor:
        batch, query_length, heads, _ = query.shape
        output = query.new_empty(query.shape)
        sums = torch.empty((batch, heads, query_length), dtype=torch.float32, device=query.device)
        weights = [query.new_empty(batch, heads, query_length, key.shape[1]) for _ in range(stored)]
        ctx.save_for_backward(query, key, value, output, sums, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
