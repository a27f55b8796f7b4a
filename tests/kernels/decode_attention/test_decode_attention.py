"""Attention to a cache: the reference against torch's fused op, the host's path, refusals, the op in graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import native
from megaseq.kernels.checks import KernelError
from megaseq.kernels.decode_attention import KeyValueCache, decode_attention, op
from megaseq.kernels.decode_attention.cases import CASES, TOLERANCE, DecodeCase
from megaseq.kernels.decode_attention.reference import reference_decode_attention

BY_NAME = {case.name: case for case in CASES}


def gathered(call: dict[str, Any]) -> Tensor:
    """The same by torch's fused op in float64, one query at a time, its keys copied together."""
    query, cache = call["query"].double(), call["cache"]
    batch, num_hyps, num_heads, _ = query.shape
    output = torch.zeros_like(query)
    for b in range(batch):
        for k in range(num_hyps):
            length = cache.capacity
            if call["lengths"] is not None:
                length = int(call["lengths"].view(batch, -1).expand(batch, num_hyps)[b, k])
            first = 0 if call["window"] is None else max(0, length - call["window"])
            if first == length:
                continue
            places = torch.arange(first, length)
            table, page = cache.table, cache.key.shape[1]
            row = torch.tensor([b]) if table is None else table[b, k] if table.dim() == 3 else table[b]
            pages = row[places // page].long()
            pair = []
            for entries, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
                found = entries[pages, places % page].double()
                if scale is not None:
                    found = found * (scale if scale.dim() == 1 else scale[pages, places % page])[..., None].double()
                pair.append(found.transpose(0, 1).repeat_interleave(num_heads // found.shape[1], 0))
            bias = torch.zeros(num_heads, 1, length - first, dtype=torch.float64)
            if call["bias"] is not None:
                columns = (call["bias"].shape[1] - length + places).clamp(min=0)
                bias = call["bias"][:, None, columns].double()
            one = query[b, k, :, None]
            if call["soft_cap"] is None:
                heads = functional.scaled_dot_product_attention(one, *pair, attn_mask=bias, scale=call["scale"])
                output[b, k] = heads[:, 0]
            else:
                scores = (one @ pair[0].transpose(1, 2)) * call["scale"]
                scores = call["soft_cap"] * torch.tanh(scores / call["soft_cap"]) + bias
                output[b, k] = (scores.softmax(-1) @ pair[1])[:, 0]
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_attention_of_each_query_alone(case: DecodeCase) -> None:
    call = case.call(dtype=torch.float64)
    torch.testing.assert_close(reference_decode_attention(**call), gathered(call), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_auto_is_the_reference(case: DecodeCase) -> None:
    """Whatever runs on this device by itself."""
    call = case.call(dtype=torch.float32)
    query = call.pop("query")
    wanted = reference_decode_attention(query.double(), **_double(call))
    got = decode_attention(query, **call)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=TOLERANCE[torch.float32])


def _double(call: dict[str, Any]) -> dict[str, Any]:
    """The call with a cache in float64 that holds the same numbers."""
    cache = call["cache"]
    if cache.key_scale is None:
        cache = dataclasses.replace(cache, key=cache.key.double(), value=cache.value.double())
    return {**call, "cache": cache}


def test_the_host_takes_the_extension_where_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the C++ extension is not built")
    monkeypatch.setenv("MEGASEQ_KERNELS", "decode_attention=native")
    plain = DecodeCase("plain", batch=3)
    places = DecodeCase("places", layout="places", lengths="all", window=5, batch=3)
    for case in (plain, places, dataclasses.replace(places, biased=True, window=None, length=19)):
        call = case.call(dtype=torch.float32)
        torch.testing.assert_close(decode_attention(**call), reference_decode_attention(**call), rtol=1e-5, atol=1e-5)
    for case in (
        dataclasses.replace(plain, soft_cap=1.0), dataclasses.replace(plain, window=3),
        dataclasses.replace(plain, biased=True), dataclasses.replace(plain, head_dim=12),
        dataclasses.replace(places, lengths="sources"), dataclasses.replace(places, stored=torch.int8),
        dataclasses.replace(plain, layout="paged"), dataclasses.replace(places, biased=True),
    ):  # fmt: skip
        call = case.call(dtype=torch.float32)
        if case.biased and case.layout == "places":
            call["window"] = None
        with pytest.raises(KernelError, match=r"decode_attention: MEGASEQ_KERNELS must name .* but is native"):
            decode_attention(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, r"query must have shape \[B, K, N, H\]"),
        ({"query": torch.zeros(2, 3, 4, 16, dtype=torch.int32)}, "query must be floating point"),
        ({"query": torch.zeros(2, 3, 3, 16)}, "key must have a number of heads that divides the query's 3"),
        ({"query": torch.zeros(2, 3, 4, 16, dtype=torch.bfloat16)}, "key must have the dtype of query"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, r"lengths must have shape \[B\] or \[B, K\]"),
        ({"lengths": torch.zeros(2)}, "lengths must be int32 or int64"),
        ({"bias": torch.zeros(2, 20)}, r"bias must have shape \[N, D\]"),
        ({"bias": torch.zeros(4, 0)}, "bias must have a column"),
        ({"bias": torch.zeros(4, 9, dtype=torch.long)}, "bias must be floating point"),
        ({"soft_cap": 0.0}, "soft_cap must be above 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"table": torch.zeros(2, 2, 9, dtype=torch.long)}, r"table must have shape \[B, W\] or \[B, K, W\]"),
        ({"table": torch.zeros(2, 9)}, "table must be int32 or int64"),
        ({"value": torch.zeros(2, 36, 4, 16)}, "value must have shape"),
        ({"value": torch.zeros(2, 37, 4, 16, dtype=torch.int8)}, "value must have the dtype of key"),
        ({"key_scale": torch.ones(4)}, "value_scale must come with the other scale"),
        ({"key_scale": torch.ones(4), "value_scale": torch.ones(4)}, "key_scale must be None for a cache that is not"),
        ({"key": torch.zeros(3, 37, 4, 16)}, r"key must have shape \[X, C, M, H\]"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    call = DecodeCase("plain").call(dtype=torch.float32)
    call |= {k: v for k, v in change.items() if k in call}
    fields = {field.name for field in dataclasses.fields(KeyValueCache)}
    call["cache"] = dataclasses.replace(call["cache"], **{k: v for k, v in change.items() if k in fields})
    with pytest.raises(KernelError, match=f"decode_attention: {message}"):
        decode_attention(**call)


def test_scales_must_fit() -> None:
    call = BY_NAME["cross_int8"].call(dtype=torch.float32)
    for name, scale, message in (
        ("key_scale", torch.ones(3), r"key_scale must have shape \[M\] or \[X, C, M\]"),
        ("value_scale", torch.ones(2, 37, 2), "value_scale must have the shape of key_scale"),
        ("key_scale", torch.ones(2, dtype=torch.float64), "key_scale must be float32"),
    ):
        with pytest.raises(KernelError, match=message):
            decode_attention(**(call | {"cache": dataclasses.replace(call["cache"], **{name: scale})}))


@pytest.mark.skipif(not native.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("page", [-1, 10**9])
def test_pages_that_are_not_there_are_one_sentence(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "decode_attention=native")
    query, key = torch.zeros(2, 3, 4, 8), torch.zeros(20, 1, 4, 8)
    table = torch.zeros(2, 3, 6, dtype=torch.int64)
    table[1, 2, 4] = page
    cache = KeyValueCache(key, key, table)
    words = rf"decode_attention: table must name pages in \[0, 20\) as far as rows are long, but is {page}\."
    with pytest.raises(KernelError, match=words):
        decode_attention(query, cache=cache, lengths=torch.full((2,), 5))
    assert not decode_attention(query, cache=cache, lengths=torch.full((2,), 4)).any()


def test_a_gradient_is_refused() -> None:
    """Before anything is computed, and by the op itself where a graph holds it."""
    call = DecodeCase("plain").call(dtype=torch.float32)
    call["query"].requires_grad_()
    with pytest.raises(KernelError, match="must not be asked for a gradient"):
        decode_attention(**call)
    with torch.no_grad():
        decode_attention(**call)
    with pytest.raises(KernelError, match="must not be asked for a gradient"):
        op.traced(**call).sum().backward()


class _Attend(torch.nn.Module):
    """One call in a module, for export."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Attends to places."""
        cache = KeyValueCache(key, value, table)
        return 2 * decode_attention(query, cache=cache, lengths=lengths, scale=0.4, window=9)


def test_the_op_is_traced_compiled_and_exported() -> None:
    call = BY_NAME["places"].call(dtype=torch.float32)
    cache: KeyValueCache = call["cache"]
    tensors = (call["query"], cache.key, cache.value, cache.table, call["lengths"])
    options = (None, None, None, 0.4, None, 9)
    torch.library.opcheck(torch.ops.megaseq.decode_attention.default, (*tensors, *options))
    with torch.no_grad():
        wanted = _Attend()(*tensors)
        compiled = torch.compile(_Attend(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), wanted)
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = ({0: batch}, None, None, {0: batch}, {0: batch})
        program = torch.export.export(_Attend(), tensors, dynamic_shapes=shapes)
        more = tuple(torch.cat([t, t]) if place in (0, 3, 4) else t for place, t in enumerate(tensors))
        torch.testing.assert_close(program.module()(*more), torch.cat([wanted, wanted]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_autocast_changes_nothing(case: DecodeCase) -> None:
    call = case.call(dtype=torch.float32)
    expected = decode_attention(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode_attention(**call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
