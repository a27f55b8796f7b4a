"""Gradients that are summed over ranks while a backward pass goes on: what is sent when, and that all of it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.parallel.gradient_sums import ALIGNMENT, GradientSums
from tests.distributed.harness import run_ranks

NAMES = ("first", "second", "third")


def parameters() -> dict[str, Tensor]:
    return {name: torch.full((3, 2 + index), 0.5, requires_grad=True) for index, name in enumerate(NAMES)}


def loss_of(tensors: dict[str, Tensor], *, used: tuple[str, ...], scale: float) -> Tensor:
    """Tensors of `used` have the gradient `scale` everywhere, made from the last to the first."""
    total = torch.zeros(())
    for name in used:
        total = total + scale * tensors[name].sum()
    return total


class Sent:
    """Notes the sizes of all that is reduced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        plain = dist.all_reduce

        def noting(tensor: Tensor, **options: Any) -> Any:
            self.sizes.append(tensor.numel())
            return plain(tensor, **options)

        monkeypatch.setattr(dist, "all_reduce", noting)


def _overlapping_rank(rank: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sent = Sent(monkeypatch)
        tensors = parameters()
        sums = GradientSums(tensors, group=dist.group.WORLD, bucket_elements=1)  # type: ignore[arg-type]
        sums.watch(tensors)
        # Not the last micro-batch: nothing is sent.
        loss_of(tensors, used=NAMES, scale=1.0).backward()  # type: ignore[no-untyped-call]
        assert sent.sizes == []
        sums.begin()
        loss_of(tensors, used=NAMES, scale=1.0 + rank).backward()  # type: ignore[no-untyped-call]
        assert sorted(sent.sizes) == [6, 9, 12]
        sums.finish()
        assert len(sent.sizes) == 3
        for tensor in tensors.values():
            assert tensor.grad is not None and torch.equal(tensor.grad, torch.full_like(tensor, 2.0 + 3.0))


def test_buckets_are_sent_in_the_last_backward_pass_alone() -> None:
    run_ranks(_overlapping_rank, world_size=2)


def _unequal_rank(rank: int) -> None:
    tensors = parameters()
    sums = GradientSums(tensors, group=dist.group.WORLD, bucket_elements=12)  # type: ignore[arg-type]
    sums.watch(tensors)
    for step in range(3):
        # Every rank has gradients of other tensors than the other, in every step others; one has none of all.
        used = ((NAMES[step],), NAMES[:step])[rank]
        sums.begin()
        if used:
            loss_of(tensors, used=used, scale=1.0).backward()  # type: ignore[no-untyped-call]
        sums.finish()
        for index, name in enumerate(NAMES):
            expected = float(index == step) + float(index < step)
            gradient = tensors[name].grad
            assert gradient is not None and torch.equal(gradient, torch.full_like(gradient, expected)), (step, name)
            tensors[name].grad = None


def test_ranks_may_lack_gradients_of_different_tensors() -> None:
    run_ranks(_unequal_rank, world_size=2, timeout_seconds=60)


def _collecting_rank(rank: int) -> list[tuple[str, ...]]:
    low = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in parameters().items()}
    high = parameters()
    asked: list[tuple[str, ...]] = []

    def collect(names: Any) -> None:
        asked.append(tuple(names))
        for name in names:
            gradient = low[name].grad
            assert gradient is not None
            high[name].grad, low[name].grad = gradient.float(), None

    sums = GradientSums(high, group=dist.group.WORLD, bucket_elements=21, collect=collect)  # type: ignore[arg-type]
    sums.watch(low)
    sums.begin()
    loss_of(low, used=NAMES, scale=1.0 + rank).backward()  # type: ignore[no-untyped-call]
    sums.finish()
    for tensor in high.values():
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.full_like(tensor, 3.0))
    places = {name: tensor.grad.storage_offset() for name, tensor in high.items() if tensor.grad is not None}
    assert places == {"third": 0, "second": ALIGNMENT, "first": 0}
    return asked


def test_gradients_are_collected_when_their_bucket_is_sent_and_stay_in_it() -> None:
    assert run_ranks(_collecting_rank, world_size=2) == [[("third", "second"), ("first",)]] * 2


def _without_watching_rank(rank: int) -> list[int]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sent = Sent(monkeypatch)
        tensors = parameters()
        sums = GradientSums(tensors, group=dist.group.WORLD, bucket_elements=1000)  # type: ignore[arg-type]
        loss_of(tensors, used=NAMES, scale=1.0).backward()  # type: ignore[no-untyped-call]
        assert sent.sizes == []
        sums.finish()
        assert all(tensor.grad is not None and bool((tensor.grad == 2.0).all()) for tensor in tensors.values())
        return sent.sizes


def test_without_watching_all_is_sent_at_the_end() -> None:
    assert run_ranks(_without_watching_rank, world_size=2) == [[48]] * 2
