"""Attention: every implementation against the reference, the reference against independent code, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.attention import AttentionMask, RelativeBias, attention, attention_with_log_sum, host
from megaseq.kernels.attention.cases import CASES, TOLERANCE, AttentionCase
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dropout import DropoutMask

IMPLEMENTATIONS = ("sdpa", "segments", "native", "auto")


def run(case: AttentionCase, *, implementation: str, patch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients of a case."""
    patch.setenv("MEGASEQ_KERNELS", implementation if implementation == "auto" else f"attention={implementation}")
    query, key, value = case.tensors(dtype=dtype)
    bias = case.bias(dtype=dtype)
    output = attention(query, key=key, value=value, mask=case.mask(), bias=bias)
    weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
    inputs = [query, key, value] + ([] if bias is None else [bias])
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_reference(case: AttentionCase, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case, implementation="reference", patch=monkeypatch, dtype=torch.float64)
    try:
        found = run(case, implementation=implementation, patch=monkeypatch, dtype=torch.float32)
    except KernelError as error:
        assert implementation in ("segments", "native")
        pytest.skip(str(error))
    for want, have in zip(expected, found, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.skipif(not native.available(), reason="there is no compiled extension")
@pytest.mark.parametrize("case", [case for case in CASES if case.packed and not case.biased and case.window is None])
def test_native_bfloat16_is_float32_rounded_once(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the gradients of keys that several query heads share are summed in float32."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "attention=native")
    results = []
    weight = torch.linspace(-1, 1, case.batch * case.query_length * case.num_heads * case.head_dim).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.detach().bfloat16().to(dtype).requires_grad_() for t in case.tensors()]
        output = attention(inputs[0], key=inputs[1], value=inputs[2], mask=case.mask())
        gradients = torch.autograd.grad(output, inputs, weight.to(dtype).view(output.shape))
        results.append([output, *gradients])
    for found, exact in zip(*results, strict=True):
        assert found.dtype is torch.bfloat16 and torch.equal(found, exact.bfloat16())


@pytest.mark.skipif(not native.available(), reason="there is no compiled extension")
@pytest.mark.parametrize("spread", [False, True], ids=["one_run", "a_run_a_row"])
@pytest.mark.parametrize("case", [case for case in CASES if case.packed and not case.biased and case.window is None])
def test_native_drops_what_the_reference_drops(
    case: AttentionCase, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset: int | Tensor = 2**32 - 500  # The low word of some row's numbers wraps.
    if spread:
        offset = torch.arange(case.batch).flip(0) * 3 * 2**31 + 2**32 - 7
    results = []
    for implementation, dtype in (("reference", torch.float64), ("native", torch.float32)):
        monkeypatch.setenv("MEGASEQ_KERNELS", f"attention={implementation}")
        inputs = case.tensors(dtype=dtype)
        dropout = DropoutMask(0.3, (3, 1, 4), offset)
        output = attention(inputs[0], key=inputs[1], value=inputs[2], mask=case.mask(), dropout=dropout, scale=0.2)
        weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
        results.append([output, *torch.autograd.grad(output, inputs, weight)])
    for want, have in zip(*results, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.skipif(not native.available(), reason="there is no compiled extension")
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("reach", [2, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_native_adds_a_bias_by_distance(causal: bool, reach: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference with the same bias for each pair; also its gradient, also with shared key heads."""
    case = AttentionCase(
        "", batch=3, query_length=24, key_length=24, num_heads=4, num_key_heads=2, causal=causal, packed=True
    )
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(4, 2 * reach + 1, generator=generator, dtype=torch.float64)
    distance = (torch.arange(24) - torch.arange(24)[:, None]).clamp(-reach, reach) + reach
    dropout = DropoutMask(rate, (3, 1, 4)) if rate else None
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    inputs, table = case.tensors(dtype=torch.float64), numbers.clone().requires_grad_()
    output = attention(
        inputs[0], key=inputs[1], value=inputs[2], mask=case.mask(), bias=table[:, distance][None], dropout=dropout
    )
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    expected = [output, *torch.autograd.grad(output, (*inputs, table), weight)]
    plan = case.mask().plan()
    assert plan is not None
    by_threads = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=threads: number)
        monkeypatch.setattr(host, "MACS_PER_THREAD", 1)
        inputs, table = case.tensors(), numbers.float().requires_grad_()
        output = host.native_attention(
            inputs[0],
            key=inputs[1],
            value=inputs[2],
            plan=plan,
            scale=0.25,
            dropout=dropout,
            bias=RelativeBias(table=table, first=-reach),
        )
        by_threads.append([output, *torch.autograd.grad(output, (*inputs, table), weight.float())])
    for want, have, again in zip(expected, *by_threads, strict=True):
        assert torch.equal(have, again)
        torch.testing.assert_close(have.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_plain_loops(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    query, key, value = case.tensors(dtype=torch.float64)
    mask, bias = case.mask(), case.bias(dtype=torch.float64)
    found = attention(query, key=key, value=value, mask=mask, bias=bias)
    query_ids, key_ids = mask.query_segment_ids, mask.key_segment_ids
    assert query_ids is not None and key_ids is not None
    shift = case.key_length - case.query_length
    for b in range(case.batch):
        for n in range(case.num_heads):
            m = n // (case.num_heads // case.num_key_heads)
            for t in range(case.query_length):
                seen = [
                    s
                    for s in range(case.key_length)
                    if query_ids[b, t] == key_ids[b, s] != 0
                    and (not case.causal or s <= t + shift)
                    and (case.window is None or abs(t + shift - s) < case.window)
                ]
                scores = [
                    float(query[b, t, n].detach() @ key[b, s, m].detach()) / math.sqrt(case.head_dim)
                    + (0.0 if bias is None else float(bias[0, n, t, s].detach()))
                    for s in seen
                ]
                total = sum(math.exp(score) for score in scores)
                want = torch.zeros(case.head_dim, dtype=torch.float64)
                for s, score in zip(seen, scores, strict=True):
                    want += math.exp(score) / total * value[b, s, m].detach()
                torch.testing.assert_close(found[b, t, n].detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "segments", "native"])
def test_rows_that_see_nothing_are_zero_and_finite(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and not native.available():
        pytest.skip("there is no compiled extension")
    monkeypatch.setenv("MEGASEQ_KERNELS", f"attention={implementation}")
    ids = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    query, key, value = (torch.randn(2, 4, 2, 16, requires_grad=True) for _ in range(3))
    output = attention(
        query, key=key, value=value, mask=AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True)
    )
    assert (output[ids == 0] == 0).all() and (output[ids != 0] != 0).any()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert (gradient[ids == 0] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), min_size=1, max_size=4),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_rows_equal_their_segments(lengths: list[list[tuple[int, int]]], causal: bool, seed: int) -> None:
    """A segment's output does not depend on what shares its row, whatever implementation runs."""
    if causal:
        lengths = [[(t, t) for t, _ in row] for row in lengths]
    sizes = [max(1, *(sum(pair[side] for pair in row) for row in lengths)) + 2 for side in (0, 1)]
    ids = [torch.zeros(len(lengths), size, dtype=torch.int64) for size in sizes]
    for b, row in enumerate(lengths):
        starts = [0, 0]
        for number, pair in enumerate(row, start=1):
            for side in (0, 1):
                ids[side][b, starts[side] : starts[side] + pair[side]] = number
                starts[side] += pair[side]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), sizes[0], 2, 16, generator=generator)
    key, value = (torch.randn(len(lengths), sizes[1], 2, 16, generator=generator) for _ in range(2))
    for implementation in ("reference", "sdpa", "segments", *(["native"] if native.available() else [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEGASEQ_KERNELS", f"attention={implementation}")
            mask = AttentionMask(query_segment_ids=ids[0], key_segment_ids=ids[1], causal=causal)
            packed = attention(query, key=key, value=value, mask=mask)
            patch.setenv("MEGASEQ_KERNELS", "reference")
            alone = torch.zeros_like(packed)
            for b, row in enumerate(lengths):
                for number in range(1, len(row) + 1):
                    t, s = ids[0][b] == number, ids[1][b] == number
                    if t.any() and s.any():
                        own = AttentionMask(causal=causal)
                        alone[b, t] = attention(
                            query[b, t][None], key=key[b, s][None], value=value[b, s][None], mask=own
                        )[0]
            torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_gradcheck_of_reference_with_everything() -> None:
    case = AttentionCase("", query_length=5, key_length=5, num_heads=2, num_key_heads=1, head_dim=3, biased=True)
    tensors = (*case.tensors(dtype=torch.float64), case.bias(dtype=torch.float64))
    ids = torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])

    def run_all(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True, window=3)
        dropout = DropoutMask(0.3, (1, 2, 3))
        return attention(query, key=key, value=value, mask=mask, bias=bias, scale=0.7, soft_cap=2.0, dropout=dropout)

    assert torch.autograd.gradcheck(run_all, tensors)


def test_gradcheck_of_reference_with_relative_bias() -> None:
    case = AttentionCase("", query_length=4, key_length=6, num_heads=2, num_key_heads=1, head_dim=3, table=(-2, 4))
    bias = case.relative(dtype=torch.float64)
    assert bias is not None and bias.table is not None

    def run_all(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_log_sum(
            query,
            key=key,
            value=value,
            mask=AttentionMask(causal=True),
            bias=RelativeBias(table=table, first=-2),
            soft_cap=2.0,
            dropout=DropoutMask(0.3, (1, 2, 3)),
        )

    assert torch.autograd.gradcheck(run_all, (*case.tensors(dtype=torch.float64), bias.table))


@pytest.mark.parametrize("kind", ["table", "slopes"])
@pytest.mark.parametrize(("queries", "keys"), [(4, 6), (6, 4), (1, 1), (0, 3), (3, 0)])
def test_relative_bias_of_every_pair(kind: str, queries: int, keys: int) -> None:
    table, slopes = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([0.5, 0.25])
    bias = RelativeBias(table=table, first=-1) if kind == "table" else RelativeBias(slopes=slopes)
    found = bias.dense(query_length=queries, key_length=keys)
    assert found.shape == (1, 2, queries, keys)
    for n in range(2):
        for t in range(queries):
            for s in range(keys):
                distance = s - t - (keys - queries)
                want = -slopes[n] * abs(distance) if kind == "slopes" else table[n, min(max(distance, -1), 1) + 1]
                assert found[0, n, t, s] == want
    second = bias.of_heads(1, 2).dense(query_length=queries, key_length=keys)
    assert torch.equal(second, found[:, 1:])
    assert bias.dense(query_length=queries, key_length=keys) is found


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_relative_bias_equals_its_dense_form(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
    case = AttentionCase("", packed=True, query_length=9, key_length=9, table=(-3, 5))
    query, key, value = case.tensors()
    bias = case.relative()
    assert bias is not None
    dense = bias.dense(query_length=9, key_length=9)
    found, want = (attention(query, key=key, value=value, mask=case.mask(), bias=given) for given in (bias, dense))
    assert torch.equal(found, want)


def test_log_sum_of_scores() -> None:
    query, key, value = AttentionCase("", num_key_heads=2).tensors(dtype=torch.float64)
    mask = AttentionMask(key_segment_ids=torch.tensor([[1] * 5 + [0] * 2, [0] * 7]))
    output, log_sum = attention_with_log_sum(query, key=key, value=value, mask=mask, scale=0.3)
    torch.testing.assert_close(output, attention(query, key=key, value=value, mask=mask, scale=0.3))
    scores = torch.einsum("btnh,bsnh->bnts", query, key.repeat_interleave(2, dim=2)) * 0.3
    torch.testing.assert_close(log_sum[0], scores[0, :, :, :5].logsumexp(-1))
    assert (log_sum[1] == float("-inf")).all()
    (gradient,) = torch.autograd.grad(log_sum[0].sum(), query)
    assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_soft_cap_and_scale() -> None:
    query, key, value = AttentionCase("").tensors(dtype=torch.float64)
    found = attention(query, key=key, value=value, scale=0.3, soft_cap=0.8)
    scores = torch.einsum("btnh,bsnh->bnts", query, key) * 0.3
    weights = (0.8 * torch.tanh(scores / 0.8)).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bnts,bsnh->btnh", weights, value))


def test_dropout_scales_and_repeats() -> None:
    query, key, value = AttentionCase("", batch=4, query_length=40, key_length=40).tensors()
    ones = torch.ones_like(value)
    with torch.no_grad():
        first, again = (attention(query, key=key, value=ones, dropout=DropoutMask(0.25, (1, 5, 9))) for _ in range(2))
        other = attention(query, key=key, value=ones, dropout=DropoutMask(0.25, (1, 6, 9)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.mean()) - 1.0) < 0.05


def test_bias_that_layers_share_is_added_to_the_mask_once() -> None:
    case = AttentionCase("", biased=True, packed=True, query_length=12, key_length=12)
    mask, bias = case.mask(), case.bias()
    assert bias is not None
    first = mask.biased(bias, dtype=torch.float32, query_length=12, key_length=12)
    assert mask.biased(bias, dtype=torch.float32, query_length=12, key_length=12) is first
    assert mask.biased(bias.clone(), dtype=torch.float32, query_length=12, key_length=12) is not first


def test_strided_views_of_a_fused_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1] * 5 + [2] * 7, [1] * 3 + [2] * 8 + [0]])
    fused = torch.randn(2, 12, 3 * 4, 16, requires_grad=True)
    results = []
    for implementation in ("reference", "auto", "attention=segments"):
        monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
        query, key, value = fused.split(4, dim=2)
        mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True)
        output = attention(query, key=key, value=value, mask=mask)
        results.append((output, *torch.autograd.grad(output.square().sum(), fused)))
    for other in results[1:]:
        for want, have in zip(results[0], other, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.zeros(2, 7, 4, 9)}, r"attention: key must have shape \[B, S, M, H\] = \[2, any, any, 16\]"),
        ({"value": torch.zeros(2, 6, 4, 16)}, r"value must have shape .* but is \[2, 6, 4, 16\]"),
        ({"key": torch.zeros(2, 7, 3, 16), "value": torch.zeros(2, 7, 3, 16)}, "divides the query's 4, but is 3"),
        ({"value": torch.zeros(2, 7, 4, 16, dtype=torch.float64)}, "value must have the dtype of query, torch.float32"),
        ({"bias": torch.zeros(1, 4, 7, 6)}, "bias must have shape"),
        ({"bias": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, "bias must be floating point, but is torch.bool"),
        ({"dropout": DropoutMask(1.5, (1, 2, 3))}, "rate must be at least 0 and below 1, but is 1.5"),
        ({"soft_cap": math.nan}, "soft_cap must be above 0, but is nan"),
        ({"bias": RelativeBias()}, "bias must have a table or slopes, but is neither"),
        ({"bias": RelativeBias(table=torch.zeros(3, 5))}, r"bias.table must have shape \[N, W\] = \[4, any\]"),
        ({"bias": RelativeBias(table=torch.zeros(4, 0))}, "bias.table must have a column"),
        ({"bias": RelativeBias(slopes=torch.zeros(4, requires_grad=True))}, "bias.slopes must need no gradient"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0, but is -1.0"),
        ({"mask": AttentionMask(key_segment_ids=torch.ones(2, 6, dtype=torch.int64))}, "mask.key_segment_ids"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict[str, object], words: str) -> None:
    query, key, value = AttentionCase("").tensors()
    arguments: dict[str, object] = {"key": key, "value": value, **change}
    with pytest.raises(KernelError, match=words) as caught:
        attention(query, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_heads_without_elements_are_one_sentence() -> None:
    empty = torch.zeros(2, 3, 4, 0)
    with pytest.raises(KernelError, match="attention: query must have heads of a width H above 0, but is 0"):
        attention(empty, key=empty, value=empty)


def test_request_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = AttentionCase("").tensors()
    monkeypatch.setenv("MEGASEQ_KERNELS", "attention=triton")
    with pytest.raises(KernelError, match="attention: MEGASEQ_KERNELS must name an implementation that can run"):
        attention(query, key=key, value=value, scale=-1.0)
    monkeypatch.setenv("MEGASEQ_KERNELS", "sdpa")
    with pytest.raises(KernelError, match="soft cap"):
        attention(query, key=key, value=value, soft_cap=3.0)
