"""A checkpointer on a temporary folder, and tensors of every kind for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaseq.checkpoint import Checkpointer


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "task.encoder.weight": randn(7, 5),
        "task.encoder.scale": randn(),
        "task.encoder.half": randn(3, 3).to(torch.bfloat16),
        "task.encoder.empty": torch.empty(0, 4),
        "task.encoder.transposed": randn(4, 6).t(),
        "task.count": torch.tensor([seed, 2**62, -1]),
        "task.mask": torch.tensor([True, False, True]),
        "learner.first_moment.task.encoder.weight": randn(7, 5),
        "ema.task.encoder.weight": randn(7, 5),
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def make(folder: Path) -> Callable[..., Checkpointer]:
    def build(*, read_only: bool = False, **changes: object) -> Checkpointer:
        p = Checkpointer.Params().replace(**changes)
        checkpointer: Checkpointer = p.instantiate(directory=folder, read_only=read_only)
        return checkpointer

    return build


def save(checkpointer: Checkpointer, step: int, **metrics: float) -> dict[str, Tensor]:
    tensors = make_tensors(step)
    checkpointer.save(step=step, tensors=tensors, state={"step": step}, metrics=metrics, files={"a/b.txt": b"text"})
    checkpointer.wait()
    return tensors
