"""The functions of the C++ extension against independent NumPy formulas, and what the bindings refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")

uint64s = st.integers(0, 2**64 - 1)


def csrc() -> Any:
    """The compiled module."""
    return native.extension()


def kept(*, count: int, key: int, offset: int, threshold: int) -> npt.NDArray[np.bool_]:
    """The formula of csrc/dropout.h in Python's integers, one element at a time."""
    mask32 = 0xFFFFFFFF
    result = []
    for element in range(count):
        index = (offset + element) % 2**64
        low, high = index & mask32, index >> 32
        h = (low * 0x9E3779B1 + (key & mask32)) & mask32
        w = ((key >> 32) + high * 0x27D4EB2F) & mask32
        w = ((w ^ (w >> 16)) * 0x85EBCA6B) & mask32
        w = ((w ^ (w >> 13)) * 0xC2B2AE35) & mask32
        h = ((h ^ (h >> 16) ^ w ^ (w >> 16)) * 0x7FEB352D) & mask32
        h = ((h ^ (h >> 15)) * 0x846CA68B) & mask32
        result.append(h >= threshold)
    return np.array(result, dtype=bool)


@given(key=uint64s, offset=uint64s, threshold=st.integers(0, 2**32 - 1), count=st.integers(0, 70))
@settings(deadline=None, max_examples=200)
def test_dropout_mask_follows_the_formula(key: int, offset: int, threshold: int, count: int) -> None:
    mask = np.full(count, 7, dtype=np.uint8)
    csrc().dropout_mask(mask, key, offset, threshold)
    assert np.array_equal(mask, kept(count=count, key=key, offset=offset, threshold=threshold))


@pytest.mark.parametrize("offset", [2**32 - 20, 5 * 2**32 - 1, 2**64 - 3])
def test_dropout_mask_where_the_low_word_wraps(offset: int) -> None:
    mask = np.empty(50, dtype=np.uint8)
    csrc().dropout_mask(mask, 0x0123456789ABCDEF, offset, 2**31)
    assert np.array_equal(mask, kept(count=50, key=0x0123456789ABCDEF, offset=offset, threshold=2**31))


@given(key=uint64s, offset=st.integers(0, 2**40), count=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_dropout_apply_on_torch_tensors(key: int, offset: int, count: int) -> None:
    threshold, scale = 2**30, 4 / 3
    source = torch.randn(count, generator=torch.Generator().manual_seed(count))
    mask = torch.from_numpy(kept(count=count, key=key, offset=offset, threshold=threshold))
    output = torch.empty_like(source)
    csrc().dropout_apply(source, output, key, offset, threshold, scale)
    expected = torch.where(mask, source * torch.tensor(scale, dtype=torch.float32), 0.0)
    assert torch.equal(output, expected)
    in_place = source.clone()
    csrc().dropout_apply(in_place, in_place, key, offset, threshold, scale)
    assert torch.equal(in_place, expected)


def test_dropout_apply_bfloat16_rounds_as_torch_does() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    source = bits.view(torch.bfloat16)
    output = torch.empty_like(source)
    scale = 1 / 0.9
    csrc().dropout_apply_bfloat16(source.view(torch.uint16), output.view(torch.uint16), 5, 9, 2**29, scale)
    mask = torch.from_numpy(kept(count=len(bits), key=5, offset=9, threshold=2**29))
    expected = torch.where(mask, (source.float() * torch.tensor(scale, dtype=torch.float32)).bfloat16(), 0.0)
    number = ~expected.isnan()
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output[number], expected[number])


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_dropout_is_unbiased_and_unrelated_between_places_and_keys(probability: float) -> None:
    count, threshold = 1 << 20, round(probability * 2**32)
    keys = [3, 4, 3 + 2**32, 3 + 2**63, 3 + 2**20, 0x9E3779B97F4A7C15]
    masks = []
    for key in keys:
        mask = np.empty(count, dtype=np.uint8)
        csrc().dropout_mask(mask, key, 0, threshold)
        masks.append(mask - (1 - probability))
    sigma = np.sqrt(probability * (1 - probability) / count)
    bound = 5 * probability * (1 - probability) / np.sqrt(count)
    for mask in masks:
        assert abs(mask.mean()) < 5 * sigma
        for lag in (1, 2, 3, 8, 64, 512, 4096):
            assert abs((mask[:-lag] * mask[lag:]).mean()) < bound * 1.1
    for one in range(len(masks)):
        for other in range(one):
            assert abs((masks[one] * masks[other]).mean()) < bound * 1.1


def test_arrays_that_do_not_fit_are_refused() -> None:
    floats = np.zeros(4, dtype=np.float32)
    with pytest.raises(ValueError, match="must have as many outputs as inputs"):
        csrc().dropout_apply(floats, floats[:3], 1, 0, 5, 1.0)
    for runs in (3, 0):
        with pytest.raises(ValueError, match="must have runs of equal length"):
            csrc().dropout_apply_runs(floats, floats, 1, np.zeros(runs, dtype=np.int64), 5, 1.0)
    with pytest.raises(TypeError):
        csrc().dropout_apply(floats.astype(np.float64), floats, 1, 0, 5, 1.0)
    with pytest.raises(TypeError):
        csrc().dropout_apply(floats, np.zeros(8, dtype=np.float32)[::2], 1, 0, 5, 1.0)
    with pytest.raises(ValueError, match="must end inside"):
        csrc().permute(np.empty(5, dtype=np.int64), 1, 4, 0)
    ints = np.ones(3, dtype=np.int32)
    with pytest.raises(ValueError, match="arrays of fitting sizes"):
        csrc().pack(ints, ints, 5, 5, 4, np.empty(3, dtype=np.int64), np.empty(3, dtype=np.int64))
