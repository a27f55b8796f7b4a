"""Which cases are proven in which types."""

from __future__ import annotations

import dataclasses

import torch

from megaseq.kernels.bench.passes import in_types


@dataclasses.dataclass(frozen=True)
class Case:
    name: str


def test_some_cases_are_proven_in_all_types() -> None:
    few, all_types = Case("few"), Case("all")
    found = in_types((few, all_types), others_of=("all",))
    assert found == [
        (few, torch.bfloat16),
        (all_types, torch.bfloat16),
        (all_types, torch.float32),
        (all_types, torch.float16),
    ]


def test_the_first_type_may_be_another() -> None:
    assert in_types([Case("few")], others_of=(), first=torch.float32) == [(Case("few"), torch.float32)]
