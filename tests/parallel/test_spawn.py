"""How many processes `megaseq train` starts by itself."""

from __future__ import annotations

from typing import Any

import pytest

from megaseq.parallel import spawn
from megaseq.parallel.layout import Parallel
from megaseq.parallel.place import Launcher, Place
from megaseq.parallel.spawn import batch_of, cores_of_rank, num_processes


@pytest.mark.parametrize(
    ("params", "devices", "count"),
    [
        ({}, 0, 1),
        ({}, 1, 1),
        ({}, 8, 8),
        ({"data": 1}, 8, 1),
        ({"data": 3, "tensor": 2}, 8, 6),
        ({"tensor": 2}, 0, 2),
        ({"tensor": 2}, 8, 8),
        ({"tensor": 2, "pipe": 3}, 8, 6),
        ({"tensor": 4, "pipe": 4}, 8, 16),
        ({"expert": 4}, 6, 4),
        ({"expert": 4}, 2, 4),
        ({"processes": 5}, 8, 5),
    ],
)
def test_axes_and_gpus_decide(params: dict[str, Any], devices: int, count: int) -> None:
    assert num_processes(Parallel.Params(**params), devices=devices) == count


def test_a_process_of_a_launcher_starts_none() -> None:
    assert batch_of(Parallel.Params(), place=Place(rank=0, world_size=2, launcher="torchrun"), devices=8) is None
    assert batch_of(Parallel.Params(), place=Place(), devices=1) is None
    batch = batch_of(Parallel.Params(), place=Place(), devices=2)
    assert batch is not None and batch.count == 2


@pytest.mark.parametrize(
    ("launcher", "bound", "told", "count"),
    [
        ("torchrun", 64, {}, 8),
        ("torchrun", 4, {}, 1),
        (
            "torchrun",
            64,
            {"SLURM_CPUS_PER_TASK": "64"},
            8,
        ),
        ("slurm", 8, {"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "64"}, 8),
        ("slurm", 64, {"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "64"}, 8),
        ("slurm", 1, {"SLURM_CPUS_PER_TASK": "8"}, 1),
        ("slurm", 8, {"SLURM_CPUS_ON_NODE": "64"}, 8),
        ("slurm", 64, {"SLURM_CPUS_ON_NODE": "64"}, 8),
        ("slurm", 64, {}, 8),
    ],
)
def test_cores_of_a_rank_are_those_that_it_has_alone(
    launcher: Launcher, bound: int, told: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "cores", lambda: bound)
    place = Place(rank=3, world_size=16, local_rank=3, local_size=8, launcher=launcher)
    assert cores_of_rank(place, environment=told) == count
