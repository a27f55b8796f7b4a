"""Dropout's kernel: bit by bit the reference, also where the number of an element needs more than 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels import dropout, dropout_add
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dropout.cases import CASES, DropoutCase
from megaseq.kernels.dropout.configs import configs
from megaseq.kernels.dropout.op import dropout_op
from megaseq.kernels.dropout.reference import hashes, kept_elements
from megaseq.kernels.triton_runtime import override
from tests.kernels.graphs import check_graphs, check_op

KEY = (2**40 + 1, 20, 2**62 + 300)


def run(
    implementation: str, *, case: DropoutCase, values: Tensor, residual: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Both functions and their gradients."""
    monkeypatch.setenv("MEGASEQ_KERNELS", f"dropout={implementation}")
    leaves = [tensor.clone().requires_grad_() for tensor in (values, residual)]
    offset = case.offset(device=values.device.type)
    alone = dropout(leaves[0], rate=case.rate, key=KEY, offset=offset)
    added = dropout_add(leaves[0], residual=leaves[1], rate=case.rate, key=KEY, offset=offset)
    gradients = torch.autograd.grad((alone * added).sum(), leaves)
    return [alone, added, *gradients]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_the_reference(
    case: DropoutCase, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    values, residual = (torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(2))
    expected = run("reference", case=case, values=values, residual=residual, monkeypatch=monkeypatch)
    found = run("triton", case=case, values=values, residual=residual, monkeypatch=monkeypatch)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype is dtype and torch.equal(have, want)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_may_differ(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under autocast: what is dropped is rounded to its dtype, the sum is not."""
    values, residual = (torch.randn(4, 90, device=device).to(dtype).requires_grad_() for dtype in dtypes)
    results = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("MEGASEQ_KERNELS", f"dropout={implementation}")
        output = dropout_add(values, residual=residual, rate=0.3, key=KEY)
        assert output.dtype is torch.float32
        results.append((output, *torch.autograd.grad(output.square().sum(), (values, residual))))
    assert all(torch.equal(have, want) for have, want in zip(*results, strict=True))
    assert torch.equal(results[0][0], residual + dropout(values, rate=0.3, key=KEY))


@pytest.mark.parametrize("config", configs(), ids=lambda config: f"{config.blocks['BLOCK']}x{config.num_warps}")
def test_all_tile_sizes(config: object, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case, values = DropoutCase("", (2, 4100)), torch.ones(2, 4100, device=device)
    expected = run("reference", case=case, values=values, residual=values, monkeypatch=monkeypatch)
    with override(dropout=config):  # type: ignore[arg-type]
        found = run("triton", case=case, values=values, residual=values, monkeypatch=monkeypatch)
    assert all(torch.equal(have, want) for have, want in zip(found, expected, strict=True))


def test_strided_input_and_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(30, 20, device=device).t().requires_grad_()
    results = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
        output = dropout_add(values, residual=values, rate=0.5, key=KEY)
        results.append((output, *torch.autograd.grad(output.t(), values, torch.ones(30, 1).expand(30, 20).to(device))))
    assert all(torch.equal(have, want) for have, want in zip(*results, strict=True))


def test_what_is_not_finite(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "triton")
    output = dropout(torch.full((1000,), float("inf"), device=device), rate=0.5, key=KEY)
    assert not output.isnan().any() and (output == 0).any()


def test_second_derivative(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "triton")
    values = torch.randn(50, device=device).requires_grad_()
    output = dropout(values, rate=0.5, key=KEY)
    (first,) = torch.autograd.grad((output**3).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), values)
    torch.testing.assert_close(second, 6 * output.detach() * (output.detach() != 0) * 4)


@pytest.mark.parametrize("runs", [False, True])
def test_is_part_of_a_graph(runs: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "triton")
    values, residual = (torch.randn(3, 40, device=device).requires_grad_() for _ in range(2))
    starts = torch.tensor([4, 2**33, 9], device=device) if runs else None

    def function(a: Tensor, b: Tensor) -> Tensor:
        return dropout_add(a, residual=b, rate=0.5, key=KEY, offset=7 if starts is None else starts)

    check_graphs(function, values, residual)
    check_op(dropout_op, values, residual, starts, 7, -5, 2**31, 2.0)


def test_float64_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "dropout=triton")
    with pytest.raises(KernelError, match=r"triton, and .*(float16, not torch\.float64|its kernels run on a GPU)"):
        dropout(torch.zeros(2, dtype=torch.float64), rate=0.5, key=KEY)


def test_a_hash_at_the_threshold_is_kept(device: torch.device) -> None:
    ones = torch.ones(9, device=device)
    threshold = int(hashes(torch.arange(9), key=5)[4])
    kept = dropout_op(ones, None, None, 0, 5, threshold, 1.0).cpu()
    assert kept[4] == 1.0
    assert torch.equal(kept.bool(), kept_elements(torch.arange(9), key=5, threshold=threshold))
