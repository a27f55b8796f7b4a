"""Ring attention in one process against the reference: the tiles, the masks, the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.kernels.attention import AttentionMask, attention, ring
from megaseq.kernels.attention.ring import RingDropout, RingSettings, chunks_of, ring_attention
from megaseq.kernels.dropout import DropoutMask

BATCH, LENGTH, WIDTH = 2, 8, 4
KEY = (1, 2, 3)


class Alone:
    """A ring of one."""

    size, index = 1, 0

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: list(tensors)


def segments() -> Tensor:
    return torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "both_sides": {"causal": False},
    "biased": {"causal": True, "biased": True},
    "grouped": {"causal": True, "key_heads": 2, "window": 3, "soft_cap": 2.0},
    "one_key_head": {"causal": False, "key_heads": 1, "window": 2, "biased": True},
    "dropped": {"causal": True, "rate": 0.4, "biased": True},
}


def tensors(*, heads: int = 4, key_heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, LENGTH, n, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def settings(case: dict[str, Any]) -> RingSettings:
    dropout: RingDropout | None = None
    if case.get("rate"):
        dropout = RingDropout(case["rate"], KEY, torch.arange(BATCH), (0, 4), (LENGTH, LENGTH))
    return RingSettings(
        ring=Alone(),
        query_segment_ids=segments(),
        key_segment_ids=segments(),
        causal=case["causal"],
        window=case.get("window"),
        scale=0.5,
        soft_cap=case.get("soft_cap"),
        dropout=dropout,
    )


@pytest.mark.parametrize("tile", [1024, 3])
@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_the_reference(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "TILE", tile)
    case = CASES[name]
    inputs = tensors(key_heads=case.get("key_heads", 4))
    values: Tensor | None = None
    bias: Tensor | None = None
    if case.get("biased"):
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(4, 2 * LENGTH - 1, dtype=torch.float64, generator=generator).requires_grad_()
        bias = values.unfold(1, LENGTH, 1).flip(1).unsqueeze(0)
    ids = segments()
    mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=case["causal"], window=case.get("window"))
    expected = attention(
        inputs[0],
        key=inputs[1],
        value=inputs[2],
        mask=mask,
        bias=bias,
        scale=0.5,
        soft_cap=case.get("soft_cap"),
        dropout=DropoutMask(case["rate"], KEY, 0) if "rate" in case else None,
    )
    got = ring_attention(inputs[0], key=inputs[1], value=inputs[2], bias=values, settings=settings(case))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = inputs if values is None else [*inputs, values]
    upstream = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_pads_get_zeros_and_give_none() -> None:
    inputs = tensors()
    got = ring_attention(inputs[0], key=inputs[1], value=inputs[2], bias=None, settings=settings(CASES["causal"]))
    assert not got[0, 6:].any()
    gradients = torch.autograd.grad(got.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[2][0, 6:].any()


def test_bfloat16_keeps_its_type_and_sums_in_float32() -> None:
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors()]
    got = ring_attention(inputs[0], key=inputs[1], value=inputs[2], bias=None, settings=settings(CASES["causal"]))
    exact = [tensor.detach().double() for tensor in inputs]
    expected = ring_attention(exact[0], key=exact[1], value=exact[2], bias=None, settings=settings(CASES["causal"]))
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=8e-3, atol=8e-3)
    assert all(g.dtype is torch.bfloat16 for g in torch.autograd.grad(got.sum(), inputs))


def test_every_process_has_two_chunks_and_the_same_causal_work() -> None:
    for size in (1, 2, 4):
        chunks = [chunks_of(index, size=size) for index in range(size)]
        assert sorted(chunk for pair in chunks for chunk in pair) == list(range(2 * size))
        # The c-th chunk sees c whole chunks before itself.
        assert len({sum(pair) for pair in chunks}) == 1
