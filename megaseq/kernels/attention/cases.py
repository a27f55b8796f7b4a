"""The calls of attention that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.attention.bias_table import TABLE_PAD
from megaseq.kernels.attention.configs import FORWARD, OF_KEY, OF_QUERY, candidates, padded
from megaseq.kernels.attention.mask import AttentionMask
from megaseq.kernels.attention.relative_bias import RelativeBias
from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.dropout import DropoutMask
from megaseq.kernels.triton_runtime import Config, architecture, override, shared_memory


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and kind of one call."""

    name: str
    batch: int = 2
    query_length: int = 7
    key_length: int = 7
    num_heads: int = 4
    num_key_heads: int = 4
    head_dim: int = 16
    causal: bool = False
    window: int | None = None
    packed: bool = False
    """Several segments and padding in each row; otherwise one segment and padding."""
    segments: int = 0
    """How many in each row; 0: two to four."""
    biased: bool = False
    """With a bias [1, N, T, S]."""
    table: tuple[int, int] | None = None
    """(first distance, number of distances) of a relative bias."""
    slopes: bool = False
    """With a relative bias of slopes."""
    scale: float | None = None
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    dropout_offset: int = 0
    tile: tuple[int, int] = (64, 64)
    """(BLOCK_M, BLOCK_N) of the kernels that the case is to run."""

    def tensors(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, T, N, H], key and value [B, S, M, H], wanting gradients; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(self.query_length, self.num_heads)] + [(self.key_length, self.num_key_heads)] * 2
        query, key, value = (
            torch.randn(self.batch, length, heads, self.head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for length, heads in shapes
        )
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()

    def bias(self, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor | None:
        """A bias [1, N, T, S] that wants a gradient, or None."""
        if not self.biased:
            return None
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.num_heads, self.query_length, self.key_length)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def relative(self, *, dtype: torch.dtype = torch.float32, seed: int = 2) -> RelativeBias | None:
        """A relative bias whose table wants a gradient, or None."""
        if self.slopes:
            return RelativeBias(slopes=torch.linspace(0.05, 0.8, self.num_heads, dtype=dtype))
        if self.table is None:
            return None
        first, width = self.table
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.num_heads, width, generator=generator, dtype=torch.float64).to(dtype)
        return RelativeBias(table=values.requires_grad_(), first=first)

    def dropout(self) -> DropoutMask | None:
        """The dropout of the call."""
        return DropoutMask(self.dropout_rate, (7, 11, 13), self.dropout_offset) if self.dropout_rate else None

    def configs(self) -> dict[str, Config]:
        """What `triton_runtime.override` takes, for the case's tiles."""
        config = Config({"BLOCK_M": self.tile[0], "BLOCK_N": self.tile[1]})
        return dict.fromkeys((FORWARD, OF_QUERY, OF_KEY), config)

    def mask(self, *, device: torch.device | str = "cpu") -> AttentionMask:
        """The mask of the call, freshly made."""
        query_ids = self._segment_ids(self.query_length).to(device)
        key_ids = query_ids
        if self.query_length != self.key_length:
            key_ids = self._segment_ids(self.key_length).to(device)
        return AttentionMask(
            query_segment_ids=query_ids, key_segment_ids=key_ids, causal=self.causal, window=self.window
        )

    def _segment_ids(self, length: int) -> Tensor:
        """[B, length]: cut at places that differ from row to row, with padding at the end."""
        ids = torch.zeros(self.batch, length, dtype=torch.int64)
        for row in range(self.batch):
            real = length - row % 3
            pieces = (self.segments or 2 + row % 3) if self.packed else 1
            bounds = [real * piece // pieces for piece in range(pieces + 1)]
            for number, (start, stop) in enumerate(pairwise(bounds), start=1):
                ids[row, start:stop] = number
        return ids


CASES = (
    AttentionCase("plain"),
    AttentionCase("causal", causal=True),
    AttentionCase("cross", query_length=5, key_length=11),
    AttentionCase("packed", batch=5, query_length=24, key_length=24, packed=True),
    AttentionCase("packed_causal", batch=5, query_length=24, key_length=24, packed=True, causal=True),
    AttentionCase("packed_cross", batch=4, query_length=17, key_length=29, packed=True),
    AttentionCase("grouped", num_key_heads=2, packed=True, query_length=12, key_length=12, causal=True),
    AttentionCase("single_key_head", num_key_heads=1),
    AttentionCase("window", query_length=16, key_length=16, causal=True, window=4),
    AttentionCase("window_both_sides", query_length=16, key_length=16, window=3, packed=True),
    AttentionCase("biased", biased=True),
    AttentionCase("biased_packed_causal", biased=True, packed=True, causal=True, query_length=20, key_length=20),
    AttentionCase("one_token", batch=1, query_length=1, key_length=1),
    AttentionCase("decode_step", batch=3, query_length=1, key_length=9),
    AttentionCase("wide_head", head_dim=96, num_heads=2, num_key_heads=2, packed=True),
)
FUSED_CASES = (
    AttentionCase("table", table=(-3, 7), tile=(32, 32)),
    AttentionCase(
        "table_packed_causal",
        table=(-9, 10),
        packed=True,
        causal=True,
        query_length=75,
        key_length=75,
        num_heads=2,
        num_key_heads=1,
        tile=(32, 32),
    ),
    AttentionCase(
        "table_far",
        batch=1,
        table=(-12, 20),
        query_length=100,
        key_length=130,
        num_heads=2,
        num_key_heads=2,
        tile=(32, 32),
    ),
    AttentionCase(
        "table_wide_tile",
        batch=1,
        table=(-20, 41),
        query_length=150,
        key_length=150,
        num_heads=1,
        num_key_heads=1,
        tile=(64, 32),
    ),
    AttentionCase(
        "table_long_tile",
        batch=1,
        table=(-20, 41),
        query_length=150,
        key_length=150,
        num_heads=1,
        num_key_heads=1,
        tile=(32, 64),
        packed=True,
    ),
    AttentionCase("table_not_around_zero", table=(5, 6), query_length=40, num_heads=2, num_key_heads=2, tile=(32, 32)),
    AttentionCase(
        "table_wider_than_row", table=(-40, 90), num_heads=2, num_key_heads=2, query_length=33, key_length=20
    ),
    AttentionCase("slopes", slopes=True, query_length=40, key_length=70, num_heads=2, num_key_heads=2, tile=(32, 32)),
    AttentionCase(
        "slopes_packed_causal",
        slopes=True,
        packed=True,
        causal=True,
        query_length=40,
        key_length=40,
        num_heads=2,
        num_key_heads=2,
    ),
    AttentionCase("soft_cap", soft_cap=1.5, scale=0.6, packed=True),
    AttentionCase("soft_cap_table", soft_cap=0.5, scale=2.0, table=(-3, 7), causal=True, num_heads=2, num_key_heads=2),
    AttentionCase(
        "dropout",
        dropout_rate=0.3,
        packed=True,
        query_length=40,
        key_length=70,
        num_heads=2,
        num_key_heads=2,
        tile=(32, 32),
    ),
    # The number of the element leaves 32 bits within a row of weights.
    AttentionCase(
        "dropout_beyond_32_bits",
        dropout_rate=0.5,
        dropout_offset=2**32 - 1017,
        num_heads=2,
        query_length=20,
        num_key_heads=1,
        key_length=50,
    ),
    AttentionCase(
        "t5",
        table=(-9, 19),
        scale=1.0,
        dropout_rate=0.1,
        packed=True,
        query_length=70,
        key_length=70,
        num_heads=2,
        num_key_heads=2,
        tile=(32, 32),
    ),
    AttentionCase(
        "many_segments",
        batch=1,
        packed=True,
        causal=True,
        query_length=128,
        key_length=128,
        num_heads=1,
        num_key_heads=1,
        tile=(32, 32),
        segments=9,
    ),
    AttentionCase(
        "far_window", batch=1, query_length=150, key_length=130, num_heads=1, num_key_heads=1, window=20, tile=(32, 32)
    ),
    AttentionCase(
        "causal_more_keys",
        batch=1,
        query_length=40,
        key_length=102,
        num_heads=2,
        num_key_heads=2,
        causal=True,
        tile=(32, 32),
    ),
    AttentionCase(
        "table_far_from_all_keys",
        batch=1,
        table=(-3, 7),
        query_length=300,
        key_length=30,
        num_heads=1,
        num_key_heads=1,
        tile=(64, 32),
    ),
    AttentionCase(
        "causal_fewer_keys",
        batch=1,
        query_length=100,
        key_length=40,
        num_heads=2,
        num_key_heads=2,
        causal=True,
        tile=(32, 32),
    ),
    AttentionCase("narrow_head", head_dim=5, num_heads=1, num_key_heads=1),
    AttentionCase("head_80", head_dim=80, num_heads=1, num_key_heads=1),
    AttentionCase("head_128", head_dim=128, num_heads=1, num_key_heads=1),
    AttentionCase("head_256", head_dim=256, num_heads=1, num_key_heads=1),
)
"""What only the fused kernels and the reference compute, or compute in many tiles."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Largest difference from the reference that a correct implementation shows at unit scale."""
NUM_TILES = {64: 3, 128: 2, 256: 2}
"""By width of the head, the most tiles that a kernel has candidates."""
SPILL_BYTES = {64: 384, 128: 512, 256: 1024, 0: 2048}
"""By width of the head, what a thread may spill with table, segments and dropout at once; 0 is float32."""


def compile_cases() -> list[CompileCase]:
    """All tiles with everything that takes registers; what else kernels can do with the tiles that they take first."""
    # On sm_100 the sums of the widest heads are too large for the memory of the tensor cores.
    kernels = {head: (FORWARD, OF_QUERY, OF_KEY) if head < 256 else (FORWARD, OF_QUERY) for head in NUM_TILES}
    full: dict[str, Any] = {"table": True, "segments": True, "dropout": True}
    kinds: dict[str, dict[str, Any]] = {
        "grouped_causal": {"causal": True, "grouped": True},
        "slopes_window_cap_runs": {"slopes": True, "causal": True, "window": True, "cap": True, "runs": True},
        "fp16_table": {"table": True, "dtype": torch.float16, "log_sum": True},
        "fp32_64": {**full, "dtype": torch.float32},
        "causal_256": {"causal": True, "segments": True, "dropout": True, "head": 256},
    }
    found = [
        CompileCase(
            f"bf16_{head}_full_{number}",
            run=functools.partial(compile_one, number=number, head=head, **full),
            tensor_cores=kernels[head],
            spill_bytes=SPILL_BYTES[head],
        )
        for head, count in NUM_TILES.items()
        for number in range(count)
    ]
    for name, kind in kinds.items():
        half, head = kind.get("dtype") is not torch.float32, kind.get("head", 64)
        budget = SPILL_BYTES[head if half else 0]
        run = functools.partial(compile_one, **kind)
        found.append(CompileCase(name, run=run, tensor_cores=kernels[head] if half else (), spill_bytes=budget))
    return found


def compile_one(*, number: int = 0, head: int = 64, dtype: torch.dtype = torch.bfloat16, **parts: bool) -> None:
    """Launches the three kernels once, with their `number`-th tiles, or the last ones that they have."""
    from megaseq.kernels.attention.triton_launch import UNBOUNDED, Call, launch_backward, launch_forward

    query = torch.empty(2, 256, 4, head, dtype=dtype)
    key = query[:, :, :2] if parts.get("grouped") else query
    mask = AttentionMask(query_segment_ids=torch.ones(2, 256, dtype=torch.int32)) if parts.get("segments") else None
    ranges = None if mask is None else mask.ranges(query_length=256, key_length=256)
    call = Call(
        query=query,
        key=key,
        value=key,
        query_ids=None if ranges is None else ranges.query_ids,
        key_ids=None if ranges is None else ranges.key_ids,
        key_ranges=None if ranges is None else ranges.key_ranges,
        query_ranges=None if ranges is None else ranges.query_ranges,
        table=torch.empty(4, 181 + 2 * TABLE_PAD) if parts.get("table") else None,
        slopes=torch.empty(4) if parts.get("slopes") else None,
        runs=torch.zeros(2, dtype=torch.int64) if parts.get("runs") else None,
        scale=0.125,
        soft_cap=30.0 if parts.get("cap") else 0.0,
        shift=0,
        low=-9 if parts.get("window") else -UNBOUNDED,
        high=0 if parts.get("causal") else UNBOUNDED,
        first=-90,
        rate=0.1 if parts.get("dropout") or parts.get("runs") else 0.0,
        dropout_key=1 << 40,
        dropout_offset=0,
    )
    log_sum = torch.empty(2, 4, 256)
    tiles: dict[str, Config] = {}
    for kernel in (FORWARD, OF_QUERY, OF_KEY):
        found = candidates(
            kernel, dtype=dtype, head=padded(head), bias=call.table is not None, arch=architecture(),
            shared=shared_memory(),
        )  # fmt: skip
        tiles[kernel] = found[min(number, len(found) - 1)]
    with override(**tiles):
        launch_forward(call)
        launch_backward(
            call,
            output=query,
            log_sum=log_sum,
            of_output=query,
            of_log_sum=log_sum if parts.get("log_sum") else None,
            trained=call.table is not None,
        )
