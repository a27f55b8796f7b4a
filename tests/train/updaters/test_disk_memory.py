"""Tensors on a disk: what they hold stays, their memory goes, and a disk without room is one line."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaseq.base.errors import ParamsError
from megaseq.checkpoint.piece import Piece
from megaseq.checkpoint.staging import Stager
from megaseq.learner import AdamW, Constant, Learner, MovingAverage, ParameterGroup
from megaseq.train.updaters.disk_memory import DiskMemory


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_contents_stay_when_memory_is_given_back(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    tensor = disk.zeros(torch.empty(1 << 22))
    assert not tensor.any()
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    tensor.copy_(values)
    used = resident()
    disk.release([tensor])
    assert used - resident() > 0.9 * tensor.nbytes
    assert torch.equal(tensor, values)


def test_what_is_expected_or_occupied_is_unchanged(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    tensor, other = disk.zeros(torch.empty(1 << 22)), torch.ones(10)
    tensor.fill_(2.0)
    disk.release([tensor])
    used = resident()
    disk.expect([tensor, other])
    disk.occupy([tensor, other])
    # Systems that do not know the second take the memory when it is written to.
    assert (tensor == 2.0).all() and other.all()
    assert resident() - used > 0.9 * tensor.nbytes


def test_files_have_no_names(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    tensor = disk.zeros(torch.empty(3, 4))
    assert tensor.shape == (3, 4) and not list(tmp_path.iterdir())


def test_what_is_in_memory_is_left_alone(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    for _ in range(5):
        # Its address may be one that a tensor on the disk had.
        disk.zeros(torch.empty(1 << 16))
        gc.collect()
        tensor = torch.ones(1 << 16)
        disk.release([tensor, tensor[5:9], torch.empty(0)])
        assert tensor.all()


def test_a_moved_tensor_keeps_values_and_gradients(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    leaf = torch.arange(6.0, requires_grad=True)
    kept = leaf.detach()
    disk.move(leaf)
    leaf.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert leaf.data_ptr() != kept.data_ptr()


def test_views_that_are_not_dense_are_released_whole(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    tensor = disk.zeros(torch.empty(1 << 11, 1 << 11)).fill_(1.0)
    used = resident()
    disk.release([tensor[:, :3]])
    assert used - resident() > 0.9 * tensor.nbytes
    assert tensor.all()


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as error:
        DiskMemory(str(tmp_path / "missing"))
    assert str(error.value).startswith("parallel.zero.nvme_path: must be a directory on a disk that has room")
    assert "(No such file or directory). Set it to another one" in str(error.value)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """For as long as a test no file may have more than a megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_is_one_line_and_not_the_end_of_the_process(tmp_path: Path, small_disk: None) -> None:
    disk = DiskMemory(str(tmp_path))
    with pytest.raises(ParamsError, match=r"has room, now for 4 MiB more, but is .* \(File too large\)"):
        disk.zeros(torch.empty(1 << 20))
    assert not list(tmp_path.iterdir())


def test_copies_for_a_checkpoint_lie_on_the_disk_too(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    tensor = disk.zeros(torch.empty(1 << 21)).fill_(3.0)
    before = resident()
    (copy,) = Stager(disk).stage([Piece("moment", (1 << 21,), (0,), tensor)])
    assert resident() - before < 0.1 * tensor.nbytes
    tensor.zero_()
    assert (copy.tensor == 3.0).all()


def test_a_learner_keeps_moments_and_averages_there(tmp_path: Path) -> None:
    disk = DiskMemory(str(tmp_path))
    params = Learner.Params(
        learning_rate=0.1, schedule=Constant.Params(), optimizer=AdamW.Params(), ema=MovingAverage.Params()
    )
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    results = []
    for zeros in (torch.zeros_like, disk.zeros):
        tensors = [values[:40].clone(), values[40:].clone()]
        learner: Learner = params.instantiate(named_parameters={"whole": values}, deferred=True)
        groups = [
            ParameterGroup((str(i),), (tensor,), weight_decay=0.0, learning_rate_scale=1.0, zeros=zeros)
            for i, tensor in enumerate(tensors)
        ]
        learner.take_shares(groups)
        stats = learner.decide(step=0, norm=1.0)
        for index, tensor in enumerate(tensors):
            learner.apply(stats, group=index, gradients=(tensor.clone(),))
            learner.average(group=index)
        results.append([*tensors, *learner.state_tensors().values()])
    assert len(results[0]) == 8
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert learner.ema is not None
    assert not torch.equal(learner.ema.tensors["0"], values[:40])
