"""Dropout: the same bits everywhere, the right rate, gradients, speed-neutral edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import native
from megaseq.kernels import dropout, dropout_add
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dropout import mix_key
from megaseq.kernels.dropout.host import host_keep_mask, host_keep_mask_of_runs
from megaseq.kernels.dropout.reference import keep_mask, keep_mask_of_runs, threshold_of

KEY = (1, 20, 300)
CPU = torch.device("cpu")


def slow_keep(index: int, *, key: int, threshold: int) -> bool:
    """The formula of megaseq/csrc/dropout.h in Python's integers."""
    word = 0xFFFFFFFF
    w = ((key >> 32) + (index >> 32) * 0x27D4EB2F) & word
    w = ((w ^ (w >> 16)) * 0x85EBCA6B) & word
    w = ((w ^ (w >> 13)) * 0xC2B2AE35) & word
    w ^= w >> 16
    h = ((index & word) * 0x9E3779B1 + (key & word)) & word
    h = ((h ^ (h >> 16) ^ w) * 0x7FEB352D) & word
    return ((h ^ (h >> 15)) * 0x846CA68B) & word >= threshold


@settings(max_examples=40, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    offset=st.one_of(st.integers(0, 2**40), st.integers(2**32 - 50, 2**32)),
    count=st.integers(1, 200),
    rate=st.floats(0.0, 0.99),
)
def test_all_implementations_agree_bit_by_bit(key: int, offset: int, count: int, rate: float) -> None:
    threshold = threshold_of(rate)
    expected = [slow_keep(offset + i, key=key, threshold=threshold) for i in range(count)]
    assert keep_mask(count, key=key, offset=offset, threshold=threshold, device=CPU).tolist() == expected
    assert host_keep_mask(count, key=key, offset=offset, threshold=threshold).tolist() == expected
    extension = native.extension()
    if extension is not None:
        found = np.zeros(count, dtype=np.uint8)
        extension.dropout_mask(found, key, offset, threshold)
        assert found.astype(bool).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    starts=st.lists(st.one_of(st.integers(0, 2**40), st.integers(2**32 - 50, 2**32 + 50)), min_size=1, max_size=5),
    width=st.integers(1, 90),
    rate=st.floats(0.0, 0.99),
)
def test_all_implementations_agree_bit_by_bit_on_runs(key: int, starts: list[int], width: int, rate: float) -> None:
    threshold, runs = threshold_of(rate), torch.tensor(starts)
    expected = [[slow_keep(first + i, key=key, threshold=threshold) for i in range(width)] for first in starts]
    assert keep_mask_of_runs(runs, width=width, key=key, threshold=threshold).tolist() == expected
    assert host_keep_mask_of_runs(runs, width=width, key=key, threshold=threshold).tolist() == expected
    extension = native.extension()
    if extension is not None:
        found = np.zeros((len(starts), width), dtype=np.float32)
        extension.dropout_apply_runs(np.ones_like(found), found, key, runs.numpy(), threshold, 1.0)
        assert (found != 0).tolist() == expected


def test_many_runs_are_done_in_pieces() -> None:
    runs = torch.arange(1000) * 977 + (torch.arange(1000) % 7) * 2**33
    expected = keep_mask_of_runs(runs, width=100, key=5, threshold=2**31)
    assert torch.equal(host_keep_mask_of_runs(runs, width=100, key=5, threshold=2**31), expected)


@pytest.mark.parametrize("kernels", ["auto", "dropout=reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_have_the_masks_of_the_whole(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of columns of some rows, given by the number of the first element of each of its rows."""
    monkeypatch.setenv("MEGASEQ_KERNELS", kernels)
    values = torch.randn(10, 8, dtype=dtype)
    whole = dropout(values, rate=0.5, key=KEY)
    rows = torch.tensor([7, 2, 3])
    block = dropout(values[rows, 3:6], rate=0.5, key=KEY, offset=rows * 8 + 3)
    assert torch.equal(block, whole[rows, 3:6])
    part = values[rows, 3:6].clone().requires_grad_()
    dropout_add(part, residual=part.detach(), rate=0.5, key=KEY, offset=rows * 8 + 3).sum().backward()
    assert torch.equal(part.grad != 0, whole[rows, 3:6] != 0)
    assert dropout(values[:0], rate=0.5, key=KEY, offset=rows[:0]).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 40000, 70001])
def test_native_equals_reference(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(size, dtype=dtype)
    automatic = dropout(values, rate=0.3, key=KEY)
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    assert torch.equal(automatic, dropout(values, rate=0.3, key=KEY))


def test_gradient_has_the_same_mask() -> None:
    values = torch.randn(30, 50, requires_grad=True)
    output = dropout(values, rate=0.4, key=KEY)
    (gradient,) = torch.autograd.grad(output.sum(), values)
    kept = output != 0
    torch.testing.assert_close(gradient, kept / 0.6)
    torch.testing.assert_close(output, values * kept / 0.6)


def test_gradcheck() -> None:
    values = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, r: dropout_add(x, residual=r, rate=0.4, key=KEY), (values, residual))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, rate=0.4, key=KEY) ** 2, (values,))


def test_dropout_add_is_the_sum() -> None:
    values, residual = torch.randn(6, 7), torch.randn(6, 7)
    expected = residual + dropout(values, rate=0.5, key=KEY)
    assert torch.equal(dropout_add(values, residual=residual, rate=0.5, key=KEY), expected)
    assert torch.equal(dropout_add(values, residual=residual, rate=0.0, key=KEY), residual + values)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_independence(rate: float) -> None:
    count = 200_000
    masks = torch.stack(
        [
            keep_mask(count, key=mix_key((1, step, place)), offset=0, threshold=threshold_of(rate), device=CPU)
            for step, place in ((0, 0), (1, 0), (0, 1), (0, 2**62))
        ]
    ).double()
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert ((1 - masks.mean(dim=1) - rate).abs() < 5 * deviation).all()
    centred = masks - masks.mean(dim=1, keepdim=True)
    correlations = (centred @ centred.T) / count / (rate * (1 - rate))
    correlations.fill_diagonal_(0)
    assert (correlations.abs() < 5 / count**0.5).all()
    for lag in (1, 2, 8, 64, 256, 1024):
        lagged = (centred[0, lag:] * centred[0, :-lag]).mean() / (rate * (1 - rate))
        assert abs(float(lagged)) < 5 / count**0.5


def test_parts_of_a_tensor_have_the_masks_of_the_whole() -> None:
    values = torch.randn(10, 8)
    whole = dropout(values, rate=0.5, key=KEY)
    assert torch.equal(dropout(values[4:], rate=0.5, key=KEY, offset=32), whole[4:])
    assert torch.equal(dropout(values.t(), rate=0.5, key=KEY), dropout(values.t().contiguous(), rate=0.5, key=KEY))


def test_infinity_that_is_dropped_is_zero() -> None:
    output = dropout(torch.full((1000,), float("inf")), rate=0.5, key=KEY)
    assert not output.isnan().any() and (output == 0).any()


def test_empty_and_rate_zero() -> None:
    values = torch.randn(3)
    assert dropout(values, rate=0.0, key=KEY) is values
    assert dropout(torch.empty(0, 4), rate=0.5, key=KEY).shape == (0, 4)


def test_errors() -> None:
    with pytest.raises(KernelError, match=r"dropout: rate must be at least 0 and below 1, but is 1\.0\."):
        dropout(torch.zeros(2), rate=1.0, key=KEY)
    with pytest.raises(KernelError, match=r"values must be floating point, but is torch\.int64"):
        dropout(torch.zeros(2, dtype=torch.int64), rate=0.5, key=KEY)
    with pytest.raises(KernelError, match=r"dropout_add: residual must have the shape of values = \[2\], but is \[3\]"):
        dropout_add(torch.zeros(2), residual=torch.zeros(3), rate=0.5, key=KEY)
    with pytest.raises(KernelError, match=r"dropout: offset must be at least 0, but is -5\."):
        dropout(torch.zeros(2), rate=0.5, key=KEY, offset=-5)
    for runs in (torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(KernelError, match=r"dropout: offset must be int64 \[R\] on cpu with R that divides 3"):
            dropout(torch.zeros(3), rate=0.5, key=KEY, offset=runs)


def test_asking_for_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "dropout=native")
    monkeypatch.setenv("MEGASEQ_NATIVE", "0")
    with pytest.raises(KernelError, match="the compiled extension is not there"):
        dropout(torch.zeros(2), rate=0.5, key=KEY)
