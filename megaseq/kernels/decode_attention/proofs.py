"""What `megaseq bench kernels` proves of decoding's attention on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import dataclasses
import functools

import torch

from megaseq.kernels.bench.passes import in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.decode_attention.cases import CASES, TOLERANCE, DecodeCase
from megaseq.kernels.decode_attention.reference import dequantise, reference_decode_attention

IN_OTHER_TYPES = ("cross", "places_bias", "cross_int8", "places_e4m3_tokens", "paged_window")
"""Names of cases that are proven in float32 and float16 too."""


def proof_cases() -> list[BenchCase]:
    """All calls, the keys of a row by one program and split among three."""
    return [
        BenchCase(
            "decode_attention",
            f"{case.name}_{short(dtype)}_shares_{shares}",
            functools.partial(compare, case, dtype=dtype, shares=shares),
        )
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES)
        for shares in (1, 3)
    ]


def compare(case: DecodeCase, device: torch.device, *, dtype: torch.dtype, shares: int) -> dict[str, Comparison]:
    """The output beside the reference in float64 on the numbers that the cache stands for."""
    # Not before: it needs Triton.
    from megaseq.kernels.decode_attention.launch import triton_decode_attention

    call = case.call(dtype=dtype, device=device)
    found = triton_decode_attention(**call, shares=shares)
    cache = call["cache"]
    key, value = (
        dequantise(entries, scale=scale, dtype=torch.float64)
        for entries, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
    )
    exact = dataclasses.replace(cache, key=key, value=value, key_scale=None, value_scale=None)
    expected = reference_decode_attention(**(call | {"query": call["query"].double(), "cache": exact}))
    return {"output": Comparison(found, expected, TOLERANCE[dtype])}
