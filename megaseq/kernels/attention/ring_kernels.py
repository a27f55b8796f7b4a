"""Ring attention whose tiles are chunks of rows, each by one launch of attention's Triton kernels.

What a launch gives of its keys alone is put together by its log-sum-exp; the backward pass gives each launch the
log-sum-exp of all keys, so that it computes its share of the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.attention import op
from megaseq.kernels.attention.bias_table import folded, readable_table
from megaseq.kernels.attention.fused import UNBOUNDED
from megaseq.kernels.attention.ranges import segment_ranges
from megaseq.kernels.attention.ring_tiles import RingSettings, Tile, first_weights, tiles
from megaseq.kernels.dropout import mix_key
from megaseq.kernels.functions import apply_one


def kernel_ring_attention(
    query: Tensor, *, key: Tensor, value: Tensor, bias: Tensor | None, settings: RingSettings
) -> Tensor:
    """`ring_attention`, see there, for calls that the kernels can run."""
    return apply_one(_KernelRing, query, key, value, bias, settings)


class _KernelRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, settings: RingSettings
    ) -> Tensor:
        table = None if bias is None else readable_table(bias)
        batch, length, heads, _ = query.shape
        total = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        log_sum = torch.full((batch, heads, length), float("-inf"), device=query.device)
        held = [key.contiguous(), value.contiguous()]
        for step in range(settings.ring.size):
            waiting = settings.ring.pass_on(held) if step + 1 < settings.ring.size else None
            for tile in tiles(settings, step=step, lengths=(length, key.shape[1]), size=None):
                inputs = _inputs(query, keys=held[0], values=held[1], table=table, settings=settings, tile=tile)
                _add(*op.attention_forward(*inputs), total=total[:, tile.queries], log_sum=log_sum[..., tile.queries])
            if waiting is not None:
                held = waiting()
        output = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, output, log_sum)
        ctx.settings = settings
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, output, log_sum = ctx.saved_tensors
        settings: RingSettings = ctx.settings
        table = None if bias is None else readable_table(bias)
        of_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        of_table = None if table is None or not ctx.needs_input_grad[3] else torch.zeros_like(table)
        held = [key.contiguous(), value.contiguous()]
        travelling = [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in held]
        for step in range(settings.ring.size):
            waiting = settings.ring.pass_on(held) if step + 1 < settings.ring.size else None
            for tile in tiles(settings, step=step, lengths=(query.shape[1], key.shape[1]), size=None):
                inputs = _inputs(query, keys=held[0], values=held[1], table=table, settings=settings, tile=tile)
                own = (gradients[0][:, tile.queries], None, output[:, tile.queries], log_sum[..., tile.queries])
                dq, dk, dv, of_this = op.attention_backward(*own, of_table is not None, *inputs)
                of_query[:, tile.queries] += dq
                travelling[0][:, tile.keys] += dk
                travelling[1][:, tile.keys] += dv
                if of_table is not None:
                    of_table += of_this
            # The gradients go on with their keys, once more than these, and so come home.
            travelled = settings.ring.pass_on(travelling)
            if waiting is not None:
                held = waiting()
            travelling = travelled()
        of_bias = None if of_table is None else folded(of_table).to(bias.dtype)
        return of_query.to(query.dtype), travelling[0].to(key.dtype), travelling[1].to(value.dtype), of_bias, None


def _inputs(
    query: Tensor, *, keys: Tensor, values: Tensor, table: Tensor | None, settings: RingSettings, tile: Tile
) -> tuple[Any, ...]:
    """What both ops take of a tile, as `op.py` says."""
    place = (tile.query_place, tile.key_place)
    if place not in settings.ranges:
        queries, held = tile.sizes
        query_ids = settings.query_segment_ids[:, place[0] : place[0] + queries]
        key_ids = settings.key_segment_ids[:, place[1] : place[1] + held]
        settings.ranges[place] = segment_ranges(query_ids, key_ids=key_ids)
    ranges = settings.ranges[place]
    low, high = -UNBOUNDED, UNBOUNDED
    if settings.window is not None:
        low, high = 1 - settings.window, settings.window - 1
    if settings.causal:
        high = 0
    rate, seed, runs = 0.0, 0, None
    if settings.dropout is not None:
        rate, seed = settings.dropout.rate, mix_key(settings.dropout.key)
        seed -= (seed >> 63) << 64  # as a signed number, which is what an operator takes
        runs = first_weights(settings, tile=tile, heads=query.shape[2])
    return (
        query[:, tile.queries], keys[:, tile.keys], values[:, tile.keys],
        ranges.query_ids, ranges.key_ids, ranges.key_ranges, ranges.query_ranges, table, None, runs,
        float(settings.scale), float(settings.soft_cap or 0.0), place[0] - place[1], low, high,
        1 - settings.query_segment_ids.shape[1], rate, seed, 0,
    )  # fmt: skip


def _add(output: Tensor, part: Tensor, *, total: Tensor, log_sum: Tensor) -> None:
    """Adds what one tile gives, `output` [B, t, N, H] and its log-sum-exp `part` [B, N, t], to what others gave."""
    together = torch.logaddexp(log_sum, part)
    # A query that has seen nothing yet: any finite number does, as both shares are zero.
    finite = together.masked_fill(together == float("-inf"), 0.0)
    before, now = ((one - finite).exp().transpose(1, 2).unsqueeze(-1) for one in (log_sum, part))
    total.mul_(before).add_(output * now)
    log_sum.copy_(together)
