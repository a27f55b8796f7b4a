"""Attention's Triton kernels as operators of torch: `megaseq::attention_forward` and `megaseq::attention_backward`.

Both take, after the tensors that they differ in:
    query [B, T, N, H], key and value [B, S, M, H];
    query_ids, key_ids, key_ranges, query_ranges: the fields of `SegmentRanges`, all or none;
    table [N, W + 2 TABLE_PAD] of biases, the first of its W columns at the distance `first`, or slopes [N], or neither:
        as `RelativeBias.readable` returns them;
    runs: int64 [R], numbers of the first weights of R equal runs of rows; None: `dropout_offset` is that of all;
    scale, soft_cap: of the scores; 0.0 is no cap;
    shift, low, high: query m and key n see each other if low <= n - m - shift <= high;
    rate, dropout_key, dropout_offset: of dropout, the key as a signed 64-bit number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.functions import direct


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_ranges: Tensor | None,
    query_ranges: Tensor | None,
    table: Tensor | None,
    slopes: Tensor | None,
    runs: Tensor | None,
    scale: float,
    soft_cap: float,
    shift: int,
    low: int,
    high: int,
    first: int,
    rate: float,
    dropout_key: int,
    dropout_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, H] and log-sum-exp, float32 [B, N, T]; minus infinity where a query sees nothing."""
    from megaseq.kernels.attention.triton_launch import Call, launch_forward

    call = Call(
        _rows(query), _rows(key), _rows(value), query_ids, key_ids, key_ranges, query_ranges,
        None if table is None else table.contiguous(), slopes, None if runs is None else runs.contiguous(), scale,
        soft_cap, shift, low, high, first, rate, dropout_key, dropout_offset,
    )  # fmt: skip
    return launch_forward(call)


_forward = torch.library.custom_op("megaseq::attention_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    output = query.new_empty(query.shape)
    return output, query.new_empty((batch, heads, queries), dtype=torch.float32)


def _run_backward(
    of_output: Tensor,
    of_log_sum: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    table_is_trained: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_ranges: Tensor | None,
    query_ranges: Tensor | None,
    table: Tensor | None,
    slopes: Tensor | None,
    runs: Tensor | None,
    scale: float,
    soft_cap: float,
    shift: int,
    low: int,
    high: int,
    first: int,
    rate: float,
    dropout_key: int,
    dropout_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and table; the last is empty where the table is not trained."""
    from megaseq.kernels.attention.triton_launch import Call, launch_backward

    call = Call(
        _rows(query), _rows(key), _rows(value), query_ids, key_ids, key_ranges, query_ranges,
        None if table is None else table.contiguous(), slopes, None if runs is None else runs.contiguous(), scale,
        soft_cap, shift, low, high, first, rate, dropout_key, dropout_offset,
    )  # fmt: skip
    dq, dk, dv, of_table = launch_backward(
        call,
        output=output.contiguous(),
        log_sum=log_sum.contiguous(),
        of_output=_rows(of_output),
        of_log_sum=None if of_log_sum is None else of_log_sum.contiguous(),
        trained=table_is_trained,
    )
    if of_table is None or table is None:
        return dq, dk, dv, log_sum.new_empty(0)
    return dq, dk, dv, of_table


_backward = torch.library.custom_op("megaseq::attention_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(
    of_output: Tensor,
    of_log_sum: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    table_is_trained: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_ranges: Tensor | None,
    query_ranges: Tensor | None,
    table: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_table = log_sum.new_empty(0)
    if table is not None and table_is_trained:
        of_table = table.new_empty(table.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), of_table


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The log-sum-exp has a gradient where several parts of the keys are joined, and nowhere else.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.settings = inputs[10:]


def _differentiate(ctx: Any, of_output: Tensor | None, of_log_sum: Tensor | None) -> tuple[Any, ...]:
    output, log_sum, *inputs = ctx.saved_tensors
    trained = ctx.needs_input_grad[7]
    of_output = torch.zeros_like(output) if of_output is None else of_output
    dq, dk, dv, of_table = attention_backward(of_output, of_log_sum, output, log_sum, trained, *inputs, *ctx.settings)
    return (dq, dk, dv, *[None] * 4, of_table if trained else None, *[None] * 11)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if neighbours of its last axis are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


attention_forward = direct(_forward, run=_run_forward, keep=_keep, differentiate=_differentiate)
"""The operator, for `triton_attention`."""
attention_backward = direct(_backward, run=_run_backward)
"""Likewise its gradient, for who puts several calls together."""
