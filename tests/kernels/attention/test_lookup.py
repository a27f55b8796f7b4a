"""Attention to places of a cache: the extension against the reference."""

from __future__ import annotations

import pytest
import torch

from megaseq.base import native
from megaseq.kernels.attention.lookup import attend_places, attend_shared, fits_lookup
from megaseq.kernels.attention.reference import reference_attention

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(("heads", "shared", "width", "length"), [(4, 4, 64, 1), (4, 2, 24, 17), (6, 1, 136, 40)])
@pytest.mark.parametrize("biased", [False, True])
def test_places(heads: int, shared: int, width: int, length: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    kept = torch.randn(90, 2, shared, width, generator=generator)
    query = torch.randn(13, 3 * heads, width, generator=generator)[:, heads : 2 * heads]  # Not contiguous.
    places = torch.randint(90, (13, length + 5), generator=generator)
    bias = torch.randn(heads, length + 2, generator=generator)[:, 2:] if biased else None
    key, value = kept.unbind(1)
    seen = places[:, :length]
    wanted = reference_attention(
        query[:, None], key=key[seen], value=value[seen], allowed=None,
        bias=None if bias is None else bias[None, :, None], scale=0.3, soft_cap=None, dropout_mask=None,
    )[:, 0]  # fmt: skip
    got = attend_places(query, key=key, value=value, places=places, length=length, scale=0.3, bias=bias)
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 64), (4, 2, 24)])
@pytest.mark.parametrize("counted", [False, True])
def test_shared(heads: int, shared: int, width: int, counted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(5, 3, heads, width, generator=generator)
    key, value = torch.randn(5, 11, 2, shared, width, generator=generator).unbind(2)
    counts = torch.tensor([11, 1, 4, 7, 10]) if counted else None
    allowed = None if counts is None else (torch.arange(11) < counts[:, None])[:, None, None].expand(-1, 1, 3, -1)
    wanted = reference_attention(
        query, key=key, value=value, allowed=allowed, bias=None, scale=0.2, soft_cap=None, dropout_mask=None
    )
    got = attend_shared(query, key=key, value=value, counts=counts, scale=0.2)
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_what_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    assert fits_lookup(like, head_dims=(64, 8))
    assert not fits_lookup(like, head_dims=(64, 12))
    assert not fits_lookup(like.bfloat16(), head_dims=(64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits_lookup(like, head_dims=(64,))
    monkeypatch.setenv("MEGASEQ_KERNELS", "attention=reference")
    assert not fits_lookup(like, head_dims=(64,))
    monkeypatch.delenv("MEGASEQ_KERNELS")
    monkeypatch.setenv("MEGASEQ_NATIVE", "0")
    assert not fits_lookup(like, head_dims=(64,))
