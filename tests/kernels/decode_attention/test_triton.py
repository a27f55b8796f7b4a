"""Triton's attention to a cache against the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megaseq.base import NestedMap
from megaseq.kernels import triton_runtime
from megaseq.kernels.checks import KernelError
from megaseq.kernels.decode_attention import KeyValueCache, decode_attention
from megaseq.kernels.decode_attention.cases import CASES, TOLERANCE, DecodeCase
from megaseq.kernels.decode_attention.reference import dequantise, reference_decode_attention
from megaseq.kernels.triton_runtime import Config
from tests.layers.test_decoding import sources
from tests.layers.test_packing import model_of

pytestmark = pytest.mark.skipif(not triton_runtime.installed(), reason="Triton is not installed")
BY_NAME = {case.name: case for case in CASES}


def exact(call: dict[str, Any]) -> torch.Tensor:
    """The reference in float64 on the numbers that the cache stands for."""
    cache: KeyValueCache = call["cache"]
    key, value = (
        dequantise(entries, scale=scale, dtype=torch.float64)
        for entries, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
    )
    plain = KeyValueCache(key, value, cache.table)
    return reference_decode_attention(**(call | {"query": call["query"].double(), "cache": plain}))


def run(call: dict[str, Any], *, shares: int | None = None) -> torch.Tensor:
    """The launcher itself; on a GPU or under the interpreter."""
    from megaseq.kernels.decode_attention.launch import triton_decode_attention

    return triton_decode_attention(**call, shares=shares)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shares", [1, 3])
def test_equals_the_reference(case: DecodeCase, shares: int, device: torch.device) -> None:
    """fp32, whole and in shares of the length, some of them empty."""
    call = case.call(dtype=torch.float32, device=device)
    with triton_runtime.override(decode_attention=_small(case)):
        got = run(call, shares=shares)
    torch.testing.assert_close(got.double(), exact(call), rtol=1e-5, atol=TOLERANCE[torch.float32])


def _small(case: DecodeCase, *, matrix: int | None = None) -> Config:
    """Tiles that no row of the cases is a multiple of."""
    rows = case.num_heads // case.num_key_heads * (1 if case.layout == "places" else case.num_hyps)
    return Config({"BLOCK_N": 16, "MATRIX": int(rows > 1) if matrix is None else matrix})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross", "places_bias", "places_e4m3_tokens", "cross_int8", "places_grouped"])
def test_half_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    call = BY_NAME[name].call(dtype=dtype, device=device)
    got = run(call, shares=2)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact(call), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_one_row_by_matrix_products(device: torch.device) -> None:
    """What a tuner may choose where each query has keys of its own."""
    case = BY_NAME["places"]
    call = case.call(dtype=torch.float32, device=device)
    with triton_runtime.override(decode_attention=_small(case, matrix=1)):
        torch.testing.assert_close(run(call).double(), exact(call), rtol=1e-5, atol=1e-5)


def test_more_shares_than_are_added_at_once(device: torch.device) -> None:
    """The sum over shares goes on where a first run of them ends."""
    case = DecodeCase("long", batch=1, num_hyps=2, num_heads=2, num_key_heads=2, length=330, lengths="hypotheses")
    call = case.call(dtype=torch.float32, device=device)
    # The largest scores come late, so that the first sums must shrink.
    call["cache"].key[:, 300:] *= 4
    with triton_runtime.override(decode_attention=_small(case)):
        got = run(call, shares=21)
    torch.testing.assert_close(got.double(), exact(call), rtol=1e-5, atol=1e-5)


def test_strides_are_followed_and_nothing_else_is_read(device: torch.device) -> None:
    """Heads before places, columns of a wider buffer, a table of which a row's tail holds nonsense."""
    call = BY_NAME["places_grouped"].call(dtype=torch.float32, device=device)
    call["lengths"] = torch.tensor([5, 30], device=device)
    wanted = exact(call)
    cache: KeyValueCache = call["cache"]
    assert cache.table is not None
    wide = torch.full((cache.key.shape[0], 1, 2, 3, 40), float("nan"), device=device)
    wide[:, :, 0, :2, 3:19], wide[:, :, 1, :2, 3:19] = cache.key, cache.value
    table = torch.full((*cache.table.shape[:2], 90), 1 << 40, device=device)
    table[:, :, : cache.table.shape[2]] = cache.table
    table[0, :, 5:], table[1, :, 30:] = -(1 << 40), 1 << 40
    query = call["query"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    key, value = (wide[:, :, which, :2, 3:19] for which in (0, 1))
    changed = call | {"query": query, "cache": KeyValueCache(key, value, table)}
    torch.testing.assert_close(run(changed, shares=2).double(), wanted, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_int32(device: torch.device) -> None:
    """Pages further apart than 2 ** 31 elements; most of the memory is never touched."""
    if device.type != "cpu":
        pytest.skip("a GPU gives all memory at once")
    case = DecodeCase("places", layout="places", batch=1, num_hyps=1, length=20, lengths="all")
    call = case.call(dtype=torch.float16)
    cache: KeyValueCache = call["cache"]
    wanted, step = exact(call), 1 << 27
    # NumPy's, as torch's new memory is poisoned here, all of it.
    apart = torch.from_numpy(np.empty(cache.key.shape[0] * step, dtype=np.float16))
    pair = []
    for entries, shift in ((cache.key, 0), (cache.value, 4096)):
        view = apart.as_strided(entries.shape, (step, 64, 16, 1), shift)
        view.copy_(entries)
        pair.append(view)
    assert cache.table is not None
    far = call | {"cache": KeyValueCache(pair[0], pair[1], cache.table.int())}
    assert cache.key.shape[0] * step > 2**31
    torch.testing.assert_close(run(far).double(), wanted, rtol=4e-3, atol=4e-3)


def test_bits_of_e4m3(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """How GPUs read it that cannot convert it: all 256 codes, NaN and subnormal numbers among them."""
    from megaseq.kernels.decode_attention import launch

    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).view(1, 1, 16, 16)
    query = torch.zeros(1, 1, 16, 16, device=device)
    cache = KeyValueCache(torch.ones_like(codes.float()).to(codes.dtype), codes)
    monkeypatch.setattr(launch, "NATIVE_E4M3", 10**6)
    monkeypatch.setattr(triton_runtime, "architecture", lambda: 80)
    got = decode_at(query, cache)
    torch.testing.assert_close(got, codes.float(), rtol=0, atol=0, equal_nan=True)


def decode_at(query: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """The value of the only key."""
    return run({"query": query, "cache": cache, "lengths": None, "bias": None, "scale": 1.0, "soft_cap": None,
                "window": None}, shares=1)  # fmt: skip


def test_dispatch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it runs, and refuses what it cannot do; empty calls give zeros."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "decode_attention=triton")
    call = BY_NAME["cross"].call(dtype=torch.float32, device=device)
    torch.testing.assert_close(decode_attention(**call).double(), exact(call), rtol=1e-5, atol=1e-5)
    empty = dataclasses.replace(call["cache"], key=call["cache"].key[:, :0], value=call["cache"].value[:, :0])
    assert not decode_attention(**(call | {"cache": empty})).any()
    with pytest.raises(KernelError, match="its kernels take float32, bfloat16 and float16"):
        decode_attention(**BY_NAME["cross"].call(dtype=torch.float64, device=device))
    wide = DecodeCase("wide", head_dim=264, num_heads=1, num_key_heads=1).call(dtype=torch.float32, device=device)
    with pytest.raises(KernelError, match="heads of a width up to 256"):
        decode_attention(**wide)


def test_a_search_by_tritons_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places, a shared memory with padding, T5's bias: as on a GPU, under the interpreter."""
    model = model_of("t5-shared").to(device)
    source = sources(2)
    source = NestedMap(ids=source.ids.to(device), segment_ids=source.segment_ids.to(device))
    found = []
    for kernels in ("decode_attention=reference", "decode_attention=triton"):
        monkeypatch.setenv("MEGASEQ_KERNELS", kernels)
        state = model.prefill(source)
        tokens = torch.tensor([4, 5], device=device)
        for hyps in ([[0, 0], [0, 0]], [[1, 0], [1, 1]], [[0, 0], [1, 0]]):
            logits, state = model.step(state, tokens=tokens)
            state = model.reorder(state, hyps=torch.tensor(hyps, device=device))
            tokens = torch.tensor([6, 7, 8, 9], device=device)
        found.append(logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
