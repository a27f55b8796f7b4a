"""Launches attention's Triton kernels: their arguments, grids and tile sizes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.attention import configs
from megaseq.kernels.attention.bias_table import LOG2_E, TABLE_PAD
from megaseq.kernels.attention.ranges import GRANULE
from megaseq.kernels.attention.triton_backward import attention_backward_key, attention_backward_query
from megaseq.kernels.attention.triton_forward import attention_forward
from megaseq.kernels.attention.triton_parts import NEVER
from megaseq.kernels.dropout.reference import WORD, threshold_of

UNBOUNDED: int = NEVER.value
"""A distance that no pair has."""
MAX_PARTS = 1 << 24
"""Numbers that the sums of a table's gradient may take; more programs than fit share rows, and the order in which those
add is not fixed."""


@dataclass
class Call:
    """What both passes take; the ops in `op.py` say what each is."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_ids: Tensor | None
    key_ids: Tensor | None
    key_ranges: Tensor | None
    query_ranges: Tensor | None
    table: Tensor | None
    slopes: Tensor | None
    runs: Tensor | None
    scale: float
    soft_cap: float
    shift: int
    low: int
    high: int
    first: int
    rate: float
    dropout_key: int
    dropout_offset: int

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.query.device

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, T, S, N)."""
        batch, queries, heads, _ = self.query.shape
        return batch, queries, self.key.shape[1], heads

    @property
    def wraps(self) -> bool:
        """Whether the numbers of weights that dropout hashes may pass a multiple of 2^32 within a row."""
        last = (self.dropout_offset & WORD) + math.prod(self.sizes)
        return self.rate > 0.0 and (self.runs is not None or last > WORD)

    def config(self, kernel: str) -> triton_runtime.Config:
        """The tile sizes of a kernel."""
        arch, shared = triton_runtime.architecture(), triton_runtime.shared_memory()
        settings = (self.query.dtype, self.query.shape[3], self.table is not None, self.rate > 0.0, arch, shared)
        key, default = _key_and_default(kernel, *settings)
        return triton_runtime.config(kernel, key=key, default=default)

    def arguments(self) -> dict[str, Any]:
        """The arguments that all kernels take, but the tensors."""
        query, key, value = self.query, self.key, self.value
        fixed = _fixed_arguments(
            query.shape, query.stride(), key.shape, key.stride(), value.stride(),
            0 if self.table is None else self.table.shape[1] - 2 * TABLE_PAD,
            0 if self.runs is None else self.runs.numel(),
            self.scale, self.soft_cap, self.shift, self.low, self.high, self.first, self.rate,
        )  # fmt: skip
        return {**fixed, "WRAPS": self.wraps, "key": self.dropout_key, "offset": self.dropout_offset}


@functools.lru_cache(maxsize=256)
def _key_and_default(
    kernel: str, dtype: torch.dtype, head: int, bias: bool, dropout: bool, arch: int, shared: int
) -> tuple[str, triton_runtime.Config]:
    """Under which name a table has the tile sizes of a kernel, and those for where none has: kept, as each layer
    asks."""
    head = configs.padded(head)
    default = configs.default(kernel, dtype=dtype, head=head, bias=bias, arch=arch, shared=shared)
    return configs.key_of(dtype=dtype, head=head, bias=bias, dropout=dropout), default


@functools.lru_cache(maxsize=256)
def _fixed_arguments(
    query: torch.Size,
    query_strides: tuple[int, ...],
    key: torch.Size,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    table_width: int,
    num_runs: int,
    scale: float,
    soft_cap: float,
    shift: int,
    low: int,
    high: int,
    first: int,
    rate: float,
) -> dict[str, Any]:
    """What layers and steps have in common: kept, as to put it together takes longer than all else."""
    batch, queries, heads, width = query
    return {
        **_named(query_strides, name="q", axes="btn"),
        **_named(key_strides, name="k", axes="bsn"),
        **_named(value_strides, name="v", axes="bsn"),
        "T": queries,
        "S": key[1],
        "N": heads,
        "GROUP": heads // key[2],
        "shift": shift,
        "low": low,
        "high": high,
        "first": first,
        "width": table_width,
        # What tanh takes is no power of two; what it gives is.
        "scale": scale / soft_cap if soft_cap else scale * LOG2_E,
        "cap": soft_cap * LOG2_E,
        "run_rows": batch * heads * queries // num_runs if num_runs else 0,
        "threshold": threshold_of(rate),
        "inverse_kept": 1.0 / (1.0 - rate),
        "HEAD": width,
        "BLOCK_D": configs.padded(width),
        "GRANULE": GRANULE,
        "HAS_CAP": soft_cap > 0.0,
        "LOW": low > -UNBOUNDED,
        "HIGH": high < UNBOUNDED,
        "DROP": rate > 0.0,
    }


def _named(strides: tuple[int, ...], *, name: str, axes: str) -> dict[str, int]:
    """The strides of all but the last axis as arguments of a kernel."""
    return {f"{name}_s{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


@triton_runtime.on_its_device
def launch_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output [B, T, N, H] and the log-sum-exp, float32 [B, N, T]."""
    batch, queries, keys, heads = call.sizes
    output = torch.empty(call.query.shape, dtype=call.query.dtype, device=call.query.device)
    log_sum = torch.empty((batch, heads, queries), dtype=torch.float32, device=call.query.device)
    if output.numel() == 0 or keys == 0:
        return output.zero_(), log_sum.fill_(float("-inf"))
    config = call.config(configs.FORWARD)
    programs = -(-queries // config.blocks["BLOCK_M"]) * batch * heads
    attention_forward[(programs,)](
        call.query, call.key, call.value, output, log_sum,
        call.query_ids, call.key_ids, call.key_ranges, call.table, call.slopes, call.runs,
        **call.arguments(), **config.arguments(),
    )  # fmt: skip
    return output, log_sum


@triton_runtime.on_its_device
def launch_backward(
    call: Call, *, output: Tensor, log_sum: Tensor, of_output: Tensor, of_log_sum: Tensor | None, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the gradients of query, key and value, and that of the table, if it is `trained`.

    Args:
        call: as of the forward pass.
        output: what that returned.
        log_sum: likewise.
        of_output: gradient of the output [B, T, N, H].
        of_log_sum: gradient of the log-sum-exp, float32 [B, N, T] contiguous; None: none.
        trained: whether the table's gradient is wanted.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.query, call.key, call.value))
    batch, queries, keys, heads = call.sizes
    if dq.numel() == 0 or dk.numel() == 0:
        of_table = torch.zeros_like(call.table) if trained and call.table is not None else None
        return dq.zero_(), dk.zero_(), dv.zero_(), of_table
    delta, negative_sum = torch.empty_like(log_sum), torch.empty_like(log_sum)
    do_sb, do_st, do_sn, _ = of_output.stride()
    common = {**call.arguments(), "do_sb": do_sb, "do_st": do_st, "do_sn": do_sn, "raw_scale": call.scale}
    config = call.config(configs.OF_QUERY)
    tiles = -(-queries // config.blocks["BLOCK_M"])
    parts = _parts(call.table, programs=batch * tiles) if trained and call.table is not None else None
    attention_backward_query[(tiles * batch * heads,)](
        call.query, call.key, call.value, output, log_sum, of_output, of_log_sum, negative_sum, delta, dq, parts,
        call.query_ids, call.key_ids, call.key_ranges, call.table, call.slopes, call.runs,
        **common, parts_rows=1 if parts is None else parts.shape[1], **config.arguments(),
    )  # fmt: skip
    config = call.config(configs.OF_KEY)
    tiles = -(-keys // config.blocks["BLOCK_N"])
    attention_backward_key[(tiles * batch * call.key.shape[2],)](
        call.query, call.key, call.value, negative_sum, of_output, delta, dk, dv,
        call.query_ids, call.key_ids, call.query_ranges, call.table, call.slopes, call.runs,
        **common, **config.arguments(),
    )  # fmt: skip
    return dq, dk, dv, None if parts is None else parts.sum(dim=1)


def _parts(table: Tensor, *, programs: int) -> Tensor:
    """Zeros for the programs of each head to sum the table's gradient in: [N, rows, W + 2 TABLE_PAD]."""
    heads, width = table.shape
    rows = min(programs, max(1, MAX_PARTS // (heads * width)))
    return torch.zeros((heads, rows, width), dtype=torch.float32, device=table.device)
