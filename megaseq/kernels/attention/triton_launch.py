"""Launches attention's Triton kernels: their arguments, grids and tile sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels import triton_runtime
from megaseq.kernels.attention import configs
from megaseq.kernels.attention.ranges import GRANULE
from megaseq.kernels.attention.triton_backward import attention_backward_key, attention_backward_query
from megaseq.kernels.attention.triton_forward import attention_forward
from megaseq.kernels.attention.triton_parts import LOG2_E as _LOG2_E
from megaseq.kernels.attention.triton_parts import NEVER
from megaseq.kernels.attention.triton_parts import TABLE_PAD as _TABLE_PAD
from megaseq.kernels.dropout.reference import threshold_of

LOG2_E: float = _LOG2_E.value
TABLE_PAD: int = _TABLE_PAD.value
UNBOUNDED: int = NEVER.value
"""A distance that no pair has."""
MAX_PARTS = 1 << 24
"""Numbers that the sums of a table's gradient may take; more programs than fit share rows, and the order in which those
add is not fixed."""


@dataclass(frozen=True)
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

    def config(self, kernel: str) -> triton_runtime.Config:
        """The tile sizes of a kernel."""
        dtype, head = self.query.dtype, configs.padded(self.query.shape[3])
        bias, dropout = self.table is not None, self.rate > 0.0
        arch = triton_runtime.architecture()
        default = configs.default(kernel, dtype=dtype, head=head, bias=bias, arch=arch)
        name = configs.key_of(dtype=dtype, head=head, bias=bias, dropout=dropout)
        return triton_runtime.config(kernel, key=name, default=default)

    def arguments(self) -> dict[str, Any]:
        """The arguments that all kernels take, but the tensors."""
        batch, queries, keys, heads = self.sizes
        width = self.query.shape[3]
        # What tanh takes is no power of two; what it gives is.
        scale = self.scale / self.soft_cap if self.soft_cap else self.scale * LOG2_E
        runs = 0 if self.runs is None else batch * heads * queries // self.runs.numel()
        return {
            **strides_of(self.query, name="q", axes="btn"),
            **strides_of(self.key, name="k", axes="bsn"),
            **strides_of(self.value, name="v", axes="bsn"),
            "T": queries,
            "S": keys,
            "N": heads,
            "GROUP": heads // self.key.shape[2],
            "shift": self.shift,
            "low": self.low,
            "high": self.high,
            "first": self.first,
            "width": 0 if self.table is None else self.table.shape[1],
            "scale": scale,
            "cap": self.soft_cap * LOG2_E,
            "key": self.dropout_key,
            "offset": self.dropout_offset,
            "run_rows": runs,
            "threshold": threshold_of(self.rate),
            "inverse_kept": 1.0 / (1.0 - self.rate),
            "HEAD": width,
            "BLOCK_D": configs.padded(width),
            "GRANULE": GRANULE,
            "HAS_CAP": self.soft_cap > 0.0,
            "LOW": self.low > -UNBOUNDED,
            "HIGH": self.high < UNBOUNDED,
            "DROP": self.rate > 0.0,
        }

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Table, each end of it repeated, and slopes, as the kernels read them: float32, of base 2."""
        table, slopes = self.table, self.slopes
        if table is not None:
            table = functional.pad((table.float() * LOG2_E)[None], (TABLE_PAD, TABLE_PAD), mode="replicate")[0]
        return table, None if slopes is None else slopes.float() * LOG2_E


def strides_of(tensor: Tensor, *, name: str, axes: str) -> dict[str, int]:
    """The strides of all but the last axis as arguments of a kernel."""
    return {f"{name}_s{axis}": tensor.stride(dim) for dim, axis in enumerate(axes)}


@triton_runtime.on_its_device
def launch_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output [B, T, N, H] and the log-sum-exp, float32 [B, N, T]."""
    batch, queries, keys, heads = call.sizes
    output = torch.empty(call.query.shape, dtype=call.query.dtype, device=call.query.device)
    log_sum = torch.empty((batch, heads, queries), dtype=torch.float32, device=call.query.device)
    if output.numel() == 0 or keys == 0:
        return output.zero_(), log_sum.fill_(float("-inf"))
    table, slopes = call.biases()
    config = call.config(configs.FORWARD)
    programs = -(-queries // config.blocks["BLOCK_M"]) * batch * heads
    attention_forward[(programs,)](
        call.query, call.key, call.value, output, log_sum,
        call.query_ids, call.key_ids, call.key_ranges, table, slopes, call.runs,
        **call.arguments(), **config.arguments(),
    )  # fmt: skip
    return output, log_sum


@triton_runtime.on_its_device
def launch_backward(
    call: Call, *, output: Tensor, log_sum: Tensor, of_output: Tensor, of_log_sum: Tensor | None, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the gradients of query, key and value, and that of the table, float32 [N, W], if it is `trained`.

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
        of_table = (
            call.table.new_zeros(call.table.shape, dtype=torch.float32) if trained and call.table is not None else None
        )
        return dq.zero_(), dk.zero_(), dv.zero_(), of_table
    table, slopes = call.biases()
    delta = torch.empty_like(log_sum)
    common = {
        **call.arguments(),
        **strides_of(of_output, name="do", axes="btn"),
        "raw_scale": call.scale,
    }
    config = call.config(configs.OF_QUERY)
    tiles = -(-queries // config.blocks["BLOCK_M"])
    pad = config.blocks["BLOCK_M"] + config.blocks["BLOCK_N"]
    parts = _parts(call, programs=batch * tiles, pad=pad) if trained else None
    attention_backward_query[(tiles * batch * heads,)](
        call.query, call.key, call.value, output, log_sum, of_output, of_log_sum, delta, dq, parts,
        call.query_ids, call.key_ids, call.key_ranges, table, slopes, call.runs,
        **common, parts_rows=1 if parts is None else parts.shape[1], parts_pad=pad, **config.arguments(),
    )  # fmt: skip
    config = call.config(configs.OF_KEY)
    tiles = -(-keys // config.blocks["BLOCK_N"])
    attention_backward_key[(tiles * batch * call.key.shape[2],)](
        call.query, call.key, call.value, log_sum, of_output, delta, dk, dv,
        call.query_ids, call.key_ids, call.query_ranges, table, slopes, call.runs,
        **common, **config.arguments(),
    )  # fmt: skip
    return dq, dk, dv, None if parts is None else _joined(parts, pad=pad)


def _parts(call: Call, *, programs: int, pad: int) -> Tensor | None:
    """Zeros for the programs of each head to sum the table's gradient in: [N, rows, W + 2 pad]."""
    if call.table is None:
        return None
    heads, width = call.table.shape
    rows = min(programs, max(1, MAX_PARTS // (heads * (width + 2 * pad))))
    return torch.zeros((heads, rows, width + 2 * pad), dtype=torch.float32, device=call.table.device)


def _joined(parts: Tensor, *, pad: int) -> Tensor:
    """The table's gradient [N, W]: the sum of all parts, with what lies beyond the ends at the ends."""
    total = parts.sum(dim=1)
    gradient = total[:, pad:-pad].clone()
    gradient[:, 0] += total[:, :pad].sum(dim=1)
    gradient[:, -1] += total[:, -pad:].sum(dim=1)
    return gradient
