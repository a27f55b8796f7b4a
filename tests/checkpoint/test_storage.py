"""The files: readable by the safetensors package, and by any layout of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megaseq.checkpoint import export_safetensors
from megaseq.checkpoint.safetensors_file import DTYPE_NAMES
from megaseq.checkpoint.storage import SafetensorsReader, SafetensorsWriter, read_metadata

from .conftest import assert_same, make_tensors


def test_exports_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"t.{name}": torch.arange(-3, 4).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    for content in (make_tensors(), {**make_tensors(), **tensors}, {}):
        export_safetensors(content, path, metadata={"format": "pt", "step": "3"})
        loaded = load_file(path)
        assert loaded.keys() == content.keys()
        for name, tensor in content.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(
                loaded[name].contiguous().view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            )
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_tensors(), path)
    with pytest.raises(TypeError, match=r"z: must have a type that safetensors knows, but is torch\.complex64"):
        export_safetensors({"z": torch.ones(2, dtype=torch.complex64)}, path)
    assert_same(load_file(path), make_tensors())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def whole() -> torch.Tensor:
    return torch.arange(10 * 6, dtype=torch.float32).view(10, 6)


def save_sharded(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tensors = {"task.rows": distribute_tensor(whole(), mesh, [Shard(0)]), "task.same": torch.ones(3) * 7}
    writer = SafetensorsWriter(Path(folder))
    save(tensors, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    dist.destroy_process_group()


def load_sharded(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tensors = {"task.rows": distribute_tensor(torch.zeros(10, 6), mesh, [Shard(1)]), "task.same": torch.zeros(3)}
    files = [path.name for path in Path(folder).glob("*.safetensors")]
    reader = SafetensorsReader(Path(folder), metadata=read_metadata(Path(folder), known_files=files))
    load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False))
    rows = tensors["task.rows"]
    assert isinstance(rows, DTensor)
    assert torch.equal(rows.full_tensor(), whole())
    assert torch.equal(tensors["task.same"], torch.ones(3) * 7)
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_two_ranks_saved_three_ranks_and_one_can_load(tmp_path: Path) -> None:
    multiprocessing.spawn(save_sharded, args=(2, str(tmp_path)), nprocs=2)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["task.00000.safetensors", "task.00001.safetensors"]
    assert load_file(tmp_path / files[1])["task.rows@5,0"].shape == (5, 6)
    multiprocessing.spawn(load_sharded, args=(3, str(tmp_path)), nprocs=3)
    tensors = {"task.rows": torch.zeros(10, 6)}
    reader = SafetensorsReader(tmp_path, metadata=read_metadata(tmp_path, known_files=files))
    load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    assert torch.equal(tensors["task.rows"], whole())
