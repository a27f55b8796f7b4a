"""Launches the kernels: how many rows to a tile, how many shares of the length."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.decode_attention import configs
from megaseq.kernels.decode_attention.cache import KeyValueCache
from megaseq.kernels.decode_attention.triton_kernels import add_shares, attend_share

MAX_SHARES = 64
"""Shares of one row's keys."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep a processor's memory pipeline full."""
NATIVE_E4M3 = 89
"""The first architecture that converts e4m3."""


@triton_runtime.on_its_device
def triton_decode_attention(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    shares: int | None = None,
) -> Tensor:
    """`decode_attention` by Triton; see there. `shares` of the keys of a row; None: what fills the GPU."""
    batch, num_hyps, num_query_heads, width = query.shape
    num_heads, page = cache.key.shape[2], cache.key.shape[1]
    group = num_query_heads // num_heads
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.numel() == 0 or cache.capacity == 0:
        return output.zero_()
    rows = group if cache.own else num_hyps * group
    kinds = f"{triton_runtime.kind_of(query.dtype)},{triton_runtime.kind_of(cache.key.dtype)}"
    crowd = configs.crowd(batch * (num_hyps if cache.own else 1) * num_heads)
    config = triton_runtime.config(
        "decode_attention",
        key=f"{kinds},head={width},rows={min(configs.MAX_ROWS, rows)},{crowd}",
        default=configs.default(rows=rows, width=width, itemsize=query.element_size()),
    )
    tile = 1
    if rows > 1 or config.blocks["MATRIX"]:
        tile = min(configs.MAX_ROWS, max(configs.MATRIX_ROWS, 1 << (rows - 1).bit_length()))
    row_tiles = -(-rows // tile)
    programs = batch * (num_hyps if cache.own else 1) * num_heads * row_tiles
    if shares is None:
        shares = _num_shares(programs, blocks=-(-cache.capacity // config.blocks["BLOCK_N"]), device=query.device)
    parts, log_sums = output, output
    if shares > 1:
        parts = torch.empty((shares, *query.shape), dtype=torch.float32, device=query.device)
        log_sums = torch.empty((shares, *query.shape[:3]), dtype=torch.float32, device=query.device)
    key, value = cache.key, cache.value
    bits = key.dtype is torch.float8_e4m3fn and 0 < triton_runtime.architecture() < NATIVE_E4M3
    if bits:
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    key_scale = query if cache.key_scale is None else cache.key_scale
    value_scale = query if cache.value_scale is None else cache.value_scale
    attend_share[(programs, shares)](
        query, key, value, query if cache.table is None else cache.table, query if lengths is None else lengths,
        query if bias is None else bias, key_scale, value_scale, parts, log_sums,
        scale, soft_cap or 0.0, window or 0, num_hyps, group, num_heads, width, page, cache.capacity,
        0 if bias is None else bias.shape[1], row_tiles,
        *query.stride(), *key.stride(), *value.stride(), *_table_strides(cache.table), *_length_strides(lengths),
        *((0, 0) if bias is None else bias.stride()), *_scale_strides(cache.key_scale),
        OWN=cache.own, TABLE=cache.table is not None, LENGTHS=lengths is not None, BIAS=bias is not None,
        SOFT_CAP=soft_cap is not None, WINDOW=window is not None,
        SCALES=0 if cache.key_scale is None else 1 if cache.key_scale.dim() == 1 else 2, E4M3_BITS=bits,
        SPLIT=shares > 1, ROWS=tile, WIDTH=configs.padded(width), **config.arguments(),
    )  # fmt: skip
    if shares > 1:
        count = output.numel() // width
        add_shares[(count,)](
            parts, log_sums, output, shares, count, width,
            WIDTH=configs.padded(width), **configs.ADDING.arguments(),
        )  # fmt: skip
    return output


def _num_shares(programs: int, *, blocks: int, device: torch.device) -> int:
    """Into how many shares the keys of a row go, so that all processors have work."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * _processors(device) // programs)
    return max(1, min(wanted, blocks, MAX_SHARES))


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; elsewhere nothing runs at the same time."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _table_strides(table: Tensor | None) -> tuple[int, ...]:
    if table is None:
        return 0, 0, 0
    return table.stride() if table.dim() == 3 else (table.stride(0), 0, table.stride(1))


def _length_strides(lengths: Tensor | None) -> tuple[int, ...]:
    if lengths is None:
        return 0, 0
    return lengths.stride() if lengths.dim() == 2 else (lengths.stride(0), 0)


def _scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    if scale is None:
        return 0, 0, 0
    return scale.stride() if scale.dim() == 3 else (0, 0, scale.stride(0))
