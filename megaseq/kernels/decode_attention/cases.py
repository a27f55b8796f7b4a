"""The calls of decode_attention that tests prove and benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.decode_attention import configs
from megaseq.kernels.decode_attention.cache import KeyValueCache

E4M3_LARGEST = 448.0
INT8_LARGEST = 127.0


@dataclass(frozen=True)
class DecodeCase:
    """Sizes and kind of one call."""

    name: str
    batch: int = 2
    num_hyps: int = 3
    num_heads: int = 4
    num_key_heads: int = 4
    head_dim: int = 16
    length: int = 37
    """The longest row."""
    layout: Literal["flat", "paged", "places"] = "flat"
    """One page a source, pages of 8 keys that its hypotheses share, or places of each hypothesis."""
    lengths: Literal["all", "sources", "hypotheses"] = "sources"
    """Whose lengths differ; among them 0 and 1."""
    stored: torch.dtype | None = None
    """int8 or e4m3; None is the query's dtype."""
    scales: Literal["head", "token"] = "head"
    biased: bool = False
    soft_cap: float | None = None
    window: int | None = None

    def call(self, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of `decode_attention`, `query` among them; the same numbers on any device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        page = {"flat": self.length, "paged": 8, "places": 1}[self.layout]
        width = -(-self.length // page)
        pages = self.batch if self.layout == "flat" else self.batch * self.num_hyps * width + 3
        shape = (pages, page, self.num_key_heads, self.head_dim)
        key, key_scale = self._store(normal(*shape), dtype=dtype)
        value, value_scale = self._store(normal(*shape), dtype=dtype)
        table: Tensor | None = None
        if self.layout != "flat":
            table = torch.randint(pages, (self.batch, self.num_hyps, width), generator=generator)
            table = table[:, 0].int() if self.layout == "paged" else table
        tensors = (key, value, table, key_scale, value_scale)
        cache = KeyValueCache(*(None if tensor is None else tensor.to(device) for tensor in tensors))  # type: ignore[arg-type]
        lengths = self._lengths()
        return {
            "query": normal(self.batch, self.num_hyps, self.num_heads, self.head_dim).to(device, dtype),
            "cache": cache,
            "lengths": None if lengths is None else lengths.to(device),
            "bias": normal(self.num_heads, 20).to(device, torch.float32) if self.biased else None,
            "scale": 0.4,
            "soft_cap": self.soft_cap,
            "window": self.window,
        }

    def _lengths(self) -> Tensor | None:
        if self.lengths == "all":
            return None
        count = self.batch if self.lengths == "sources" else self.batch * self.num_hyps
        known = torch.tensor([self.length, self.length // 2 + 1, 1, 0, self.length - 1, 3])
        lengths = known.repeat(-(-count // known.numel()))[:count]
        return lengths if self.lengths == "sources" else lengths.view(self.batch, self.num_hyps).int()

    def _store(self, entries: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.stored is None:
            return entries.to(dtype), None
        largest = INT8_LARGEST if self.stored is torch.int8 else E4M3_LARGEST
        over = (0, 1, 3) if self.scales == "head" else (3,)
        scale = (entries.abs().amax(dim=over, keepdim=True) / largest).float()
        scaled = entries / scale
        stored = scaled.round().to(torch.int8) if self.stored is torch.int8 else scaled.float().to(self.stored)
        return stored, scale.view(-1) if self.scales == "head" else scale.squeeze(-1)


_INT8, _E4M3 = torch.int8, torch.float8_e4m3fn
CASES = (
    DecodeCase("one_key", length=1, lengths="all"),
    DecodeCase("cross", batch=4),
    DecodeCase("cross_lengths_of_hypotheses", lengths="hypotheses", num_key_heads=2),
    DecodeCase("cross_wide_head", head_dim=136, batch=1, lengths="all", num_heads=2, num_key_heads=1),
    DecodeCase("many_queries", batch=1, num_hyps=21, num_key_heads=1, lengths="all"),
    DecodeCase("paged", layout="paged", batch=4, num_key_heads=1),
    DecodeCase("paged_window", layout="paged", lengths="hypotheses", window=7, soft_cap=3.0),
    DecodeCase("places", layout="places", lengths="hypotheses", head_dim=24),
    DecodeCase("places_bias", layout="places", batch=4, biased=True, num_heads=2, num_key_heads=2),
    DecodeCase("places_grouped", layout="places", num_key_heads=2, biased=True, window=30, lengths="all"),
    DecodeCase("places_single_key_head", layout="places", num_key_heads=1, batch=1, soft_cap=2.0),
    DecodeCase("cross_int8", stored=_INT8, num_key_heads=2),
    DecodeCase("cross_int8_tokens", stored=_INT8, scales="token"),
    DecodeCase("places_int8_tokens", stored=_INT8, scales="token", layout="places", batch=1),
    DecodeCase("paged_e4m3", stored=_E4M3, layout="paged", num_key_heads=1),
    DecodeCase("places_e4m3_tokens", stored=_E4M3, scales="token", layout="places", batch=1),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference from the float64 reference of the same stored numbers that a correct implementation shows."""


SPILL_BYTES = 32
"""Bytes that a thread may spill: none in the loop over the keys, but some addresses of the output."""


def compile_cases() -> list[CompileCase]:
    """Launches of every kernel, and with every tile that may be chosen."""
    kinds: dict[str, dict[str, Any]] = {
        "cross": {"batch": 1},
        "cross_hypotheses": {"batch": 1, "lengths": "hypotheses", "soft_cap": 2.0},
        "paged": {"batch": 1, "layout": "paged", "num_key_heads": 1, "window": 9},
        "places": {"batch": 1, "layout": "places"},
        "places_bias": {"batch": 1, "layout": "places", "biased": True},
        "places_grouped": {"batch": 1, "layout": "places", "num_key_heads": 2, "biased": True},
    }
    variants: list[CompileCase] = []
    for kind, options in kinds.items():
        for head_dim in (64, 128):
            case = DecodeCase(kind, head_dim=head_dim, num_hyps=4, length=64, **options)
            for dtype in (torch.bfloat16, torch.float32):
                tuned = kind in ("cross", "places") and dtype is torch.bfloat16
                variants += _variants(case, dtype=dtype, tuned=tuned)
    for stored in (_INT8, _E4M3):
        for layout, scales in (("flat", "head"), ("places", "token")):
            name = f"{layout}_{str(stored).removeprefix('torch.')}"
            case = DecodeCase(name, head_dim=64, num_hyps=4, length=64, layout=layout, stored=stored, scales=scales)  # type: ignore[arg-type]
            variants += _variants(case, dtype=torch.bfloat16, tuned=False)
    return variants


def _variants(case: DecodeCase, *, dtype: torch.dtype, tuned: bool) -> list[CompileCase]:
    """The launches of one case: with the default tile, or with all that a tuner tries."""
    group = case.num_heads // case.num_key_heads
    rows = group * (1 if case.layout == "places" else case.num_hyps)
    found = []
    for config in configs.configs(rows=rows, width=case.head_dim, itemsize=dtype.itemsize)[: None if tuned else 1]:
        tile = "_".join(f"{name.lower()}{size}" for name, size in config.blocks.items())
        kind = str(dtype).removeprefix("torch.")
        name = f"{case.name}-{kind}-h{case.head_dim}-{tile}-w{config.num_warps}-s{config.num_stages}"
        run = _launch(case, dtype=dtype, config=config, both=tuned)
        found.append(CompileCase(name, run, spill_bytes=SPILL_BYTES))
    return found


def _launch(case: DecodeCase, *, dtype: torch.dtype, config: triton_runtime.Config, both: bool) -> Callable[[], None]:
    def run() -> None:
        from megaseq.kernels.decode_attention.launch import triton_decode_attention

        call = case.call(dtype=dtype)
        query = call.pop("query")
        with triton_runtime.override(decode_attention=config):
            # With several shares, which a second kernel adds; and with one, which writes the output itself.
            for shares in (2, 1) if both else (2,):
                triton_decode_attention(query, **call, shares=shares)

    return run
