"""Rows of strided tensors: the two loops reach what indexing reaches, and copies are made only where they must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.kernels.rows import rows_of


def walked(x: Tensor) -> Tensor:
    """The rows that a kernel would read."""
    rows = rows_of(x)
    number = torch.arange(rows.count)
    inner, outer_stride, inner_stride = rows.walk
    first = number // inner * outer_stride + number % inner * inner_stride
    memory = torch.as_strided(
        rows.tensor, (rows.tensor.untyped_storage().size() // 8 - rows.tensor.storage_offset(),), (1,)
    )
    return memory[first[:, None] + torch.arange(x.shape[-1])]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_elements_are_reached(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    x = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64).view(shape)
    x = x.permute(data.draw(st.permutations(range(len(shape)))))
    for dim in range(x.dim()):
        first = data.draw(st.integers(0, x.shape[dim] - 1))
        x = x.narrow(dim, first, data.draw(st.integers(1, x.shape[dim] - first)))
    assert torch.equal(walked(x), x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 5, 8),
        torch.zeros(3, 5, 24)[..., 8:16],
        torch.zeros(3, 5, 6, 8)[:, :, 2:4],
        torch.zeros(5, 3, 8).transpose(0, 1),
        torch.zeros(1, 8).expand(4, 8),
        torch.zeros(8),
    ],
)
def test_slices_stay_where_they_are(x: Tensor) -> None:
    assert rows_of(x).tensor is x


def test_three_loops_are_a_copy() -> None:
    assert rows_of(torch.zeros(4, 6, 8, 10)[:3, :4, :5]).tensor.is_contiguous()


def test_no_rows() -> None:
    assert rows_of(torch.zeros(0, 4)).count == 0
    assert rows_of(torch.zeros(3, 0, 4)).count == 0
