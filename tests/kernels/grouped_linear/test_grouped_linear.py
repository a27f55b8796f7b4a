"""Every implementation against the definition; gradients; what is refused."""

from __future__ import annotations

import pytest
import torch

from megaseq.kernels import dispatch
from megaseq.kernels.checks import KernelError
from megaseq.kernels.grouped_linear import grouped_linear

COUNTS = [[3, 0, 4, 1], [0, 0, 0, 8], [0, 0, 0, 0]]


@pytest.mark.parametrize("implementation", ["reference", "grouped_mm"])
@pytest.mark.parametrize("counts", COUNTS[:2])
def test_each_group_by_its_own_matrix(counts: list[int], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, implementation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=generator).requires_grad_()
    weight = torch.randn(4, 12, 16, generator=generator).requires_grad_()
    y = grouped_linear(x, weight=weight, counts=counts)
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expected = torch.einsum("ad,afd->af", x, weight[groups])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(8, 12, generator=generator)
    for got, want in zip(
        torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, weight=b, counts=COUNTS[0]), (x, weight))


def test_no_rows() -> None:
    weight = torch.randn(4, 2, 3, requires_grad=True)
    y = grouped_linear(torch.zeros(0, 3), weight=weight, counts=COUNTS[2])
    assert y.shape == (0, 2)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert not gradient.any()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"counts must add up to the 5 rows, but is 4"):
        grouped_linear(torch.zeros(5, 3), weight=torch.zeros(2, 2, 3), counts=[2, 2])
    for weight, counts, words in (
        (torch.zeros(2, 2, 3), [7, -2], "counts must be at least 0, but is -2"),
        (
            torch.zeros(2, 2, 3).bfloat16(),
            [2, 3],
            r"weight must have the dtype of x, torch\.float32, but is torch\.bfloat16",
        ),
        (torch.zeros(2, 2, 3, device="meta"), [2, 3], "weight must be on the device of x, cpu, but is meta"),
    ):
        with pytest.raises(KernelError, match=words):
            grouped_linear(torch.zeros(5, 3), weight=weight, counts=counts)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(torch.ones(5, 3).bfloat16(), weight=torch.ones(2, 2, 3), counts=[2, 3])
    assert torch.equal(y, torch.full((5, 2), 3.0, dtype=torch.bfloat16))
    monkeypatch.setenv(dispatch.VARIABLE, "grouped_mm")
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        grouped_linear(torch.zeros(4, 3), weight=torch.zeros(2, 2, 3), counts=[2, 2])
