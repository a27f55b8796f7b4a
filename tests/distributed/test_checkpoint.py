"""Many ranks save and restore one checkpoint: synthetic tensors, cut in every way that a layout cuts them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megaseq.checkpoint.storage as storage
from megaseq.base.errors import CheckpointError
from megaseq.checkpoint import (
    Checkpointer,
    Piece,
    fragment_pieces,
    init_from,
    load_checkpoint,
    shard_pieces,
    whole_piece,
)
from megaseq.checkpoint.ranks import Ranks
from megaseq.parallel.spec import Box, Shard
from tests.distributed.harness import run_ranks

LAYOUTS = ("replicated", "tensor", "pipe", "zero", "tensor_zero")


def model(step: int = 1) -> dict[str, Tensor]:
    """The logical tensors, each element another number."""
    shapes: dict[str, tuple[int, ...]] = {
        "task.embedding": (13, 6),
        "task.fused": (12, 5),
        "task.norm": (7,),
        "task.cube": (3, 4, 5),
        "task.scale": (),
        "learner.moment.task.fused": (12, 5),
    }
    values: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = int(torch.Size(shape).numel())
        values[name] = (torch.arange(count, dtype=torch.float32) + 1000 * number + 100_000 * step).reshape(shape)
    values["learner.count"] = torch.tensor([step, 2**40])
    return values


def rows(shape: tuple[int, ...], *, parts: int, index: int, fused: int = 1) -> Shard:
    """The rows of one of `parts` ranks, of each of `fused` parts."""
    length = shape[0] // fused
    low, high = length * index // parts, length * (index + 1) // parts
    rest = (0,) * (len(shape) - 1)
    boxes = tuple(
        Box(
            start=(number * length + low, *rest),
            local_start=(number * (high - low), *rest),
            size=(high - low, *shape[1:]),
        )
        for number in range(fused)
    )
    return Shard(axes=("tensor",), boxes=boxes, local_shape=(fused * (high - low), *shape[1:]))


def cut(values: dict[str, Tensor], *, layout: str, rank: int, size: int) -> list[Piece]:
    """What a rank holds under a layout; copies, so that reading into them shows."""
    pieces: list[Piece] = []
    for number, (name, value) in enumerate(values.items()):
        shape = tuple(value.shape)
        parts, index = {"tensor": (size, rank), "tensor_zero": (max(1, size // 2), rank // 2)}.get(layout, (1, 0))
        sharded = value.dim() > 0 and value.is_floating_point() and "norm" not in name and parts > 1
        shard = rows(shape, parts=parts, index=index, fused=2 if "fused" in name else 1) if sharded else None
        local = value.clone() if shard is None else torch.cat([box.of_global(value) for box in shard.boxes])
        if layout == "pipe" and number % size != rank and name != "task.norm":
            continue
        if layout in ("zero", "tensor_zero") and value.is_floating_point():
            share, shares = (rank, size) if layout == "zero" else (rank % 2, min(2, size))
            total = local.numel()
            first, stop = total * share // shares, total * (share + 1) // shares
            flat = local.reshape(-1)[first:stop].clone()
            pieces += fragment_pieces(name, flat, first=first, shard=shard, global_shape=shape)
        else:
            pieces += shard_pieces(name, local, shard=shard, global_shape=shape)
    return pieces


def check(pieces: list[Piece], *, step: int) -> None:
    """Every piece holds its block of the model."""
    expected = model(step)
    for piece in pieces:
        where = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
        assert torch.equal(piece.tensor, expected[piece.name][where]), piece.name


def build(folder: str, *, ranks: Ranks, **changes: Any) -> Checkpointer:
    """A checkpointer of all ranks."""
    made: Checkpointer = (
        Checkpointer.Params().replace(**changes).instantiate(directory=folder, ranks=ranks, layout="a layout")
    )
    return made


# ---- what a rank does -------------------------------------------------------------------------------------------


def save_all(rank: int, folder: str, size: int, asynchronous: bool) -> None:
    ranks = Ranks()
    for step, layout in enumerate(LAYOUTS, start=1):
        checkpointer = build(f"{folder}/{layout}", ranks=ranks, asynchronous=asynchronous)
        for turn in (1, 2):  # The second has the plan of the first.
            pieces = cut(model(step + turn), layout=layout, rank=rank, size=size)
            checkpointer.save(step=turn, tensors=pieces, state={"from": rank}, files={"name": str(rank).encode()})
            for piece in pieces:
                piece.tensor.zero_()
        checkpointer.wait()


def load_all(rank: int, folder: str, size: int) -> None:
    ranks = Ranks()
    for step, written in enumerate(LAYOUTS, start=1):
        for layout in LAYOUTS:
            pieces = cut(model(0), layout=layout, rank=rank, size=size)
            restored = build(f"{folder}/{written}", ranks=ranks, keep_last=9).restore(tensors=pieces)
            assert (restored.step, restored.state, restored.files) == (2, {"from": 0}, {"name": b"0"})
            check(pieces, step=step + 2)


def fall_back(rank: int, folder: str) -> tuple[int, tuple[str, ...]]:
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks)
    for step in (1, 2, 3):
        checkpointer.save(step=step, tensors=cut(model(step), layout="zero", rank=rank, size=ranks.size), state={})
    checkpointer.wait()
    if rank == 0:
        (Path(folder) / "step_00000003" / "state.json").unlink()
        damaged = Path(folder) / "step_00000002" / "task.00001.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    pieces = cut(model(0), layout="pipe", rank=rank, size=ranks.size)
    restored = checkpointer.restore(tensors=pieces)
    check(pieces, step=1)
    # The damaged ones do not count among those kept.
    for step in (4, 5):
        checkpointer.save(step=step, tensors=cut(model(step), layout="zero", rank=rank, size=ranks.size), state={})
        checkpointer.wait()
    dist.barrier()
    assert checkpointer.list_steps() == [1, 4, 5]
    return restored.step, restored.messages


class FullDisk:
    """Makes the disk of one rank full."""

    def __init__(self) -> None:
        self._write = storage.write_entries

    def __enter__(self) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        storage.write_entries = fail  # type: ignore[assignment]

    def __exit__(self, *details: object) -> None:
        storage.write_entries = self._write


def run_out_of_space(rank: int, folder: str, asynchronous: bool) -> str:
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks, asynchronous=asynchronous)
    pieces = cut(model(1), layout="zero", rank=rank, size=ranks.size)
    checkpointer.save(step=1, tensors=pieces, state={}, wait=True)
    message = ""
    full = FullDisk()
    if rank == 1:
        full.__enter__()
    try:
        checkpointer.save(step=2, tensors=pieces, state={})
        checkpointer.wait()
    except CheckpointError as error:
        message = str(error)
    full.__exit__()
    dist.barrier()
    assert os.listdir(folder) == ["step_00000001"]
    checkpointer.save(step=3, tensors=pieces, state={})  # Goes on when there is room again.
    checkpointer.wait()
    assert checkpointer.restore(tensors=pieces).step == 3
    check(pieces, step=1)
    return message


def save_wrong(rank: int, folder: str, kind: str) -> str:
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks)
    state = {}
    pieces = [Piece("task.w", (4, 3), (2 * rank, 0), torch.zeros(2, 3))]
    if kind == "overlap":
        pieces = [Piece("task.w", (4, 3), (rank, 0), torch.zeros(3, 3))]
    elif kind == "gap":
        pieces = [Piece("task.w", (4, 3), (2 * rank, 0), torch.zeros(2, 3 - rank))]
    elif kind == "type" and rank == 1:
        pieces = [Piece("task.w", (4, 3), (2, 0), torch.zeros(2, 3, dtype=torch.bfloat16))]
    elif kind == "nan" and rank == 1:
        pieces[0].tensor[0, 0] = float("nan")
    elif kind == "state" and rank == 1:
        state = {"bad": object()}
    try:
        checkpointer.save(step=1, tensors=pieces, state=state)
        checkpointer.wait()
    except CheckpointError as error:
        dist.barrier()  # Rank 0 removes what was written.
        assert not list(Path(folder).glob("*"))
        return str(error)
    return "saved"


def load_wrong(rank: int, folder: str, kind: str) -> str:
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks)
    pieces = cut(model(1), layout="pipe", rank=rank, size=ranks.size)
    checkpointer.save(step=1, tensors=pieces, state={}, wait=True)
    if kind == "unknown" and rank == 1:
        pieces.append(whole_piece("task.other", torch.zeros(3)))
    elif kind == "missing":
        pieces = [piece for piece in pieces if piece.name != "task.cube"]
    elif kind == "shape":
        pieces = [p if p.name != "task.cube" else whole_piece("task.cube", torch.zeros(3, 4, 6)) for p in pieces]
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(tensors=pieces)
    return str(caught.value)


def collide(rank: int, folder: str) -> int:
    """Trains, that is all-reduces, while the writer's thread writes and agrees."""
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks, keep_last=2)
    gradient = torch.ones(10_000)
    for step in range(1, 9):
        checkpointer.save(step=step, tensors=cut(model(step), layout="zero", rank=rank, size=ranks.size), state={})
        for _ in range(20):
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    checkpointer.wait()
    assert bool((gradient == 1).all())
    # The first rank deletes old checkpoints after all agreed that the new one stands: the others may be here before.
    dist.barrier()
    return len(checkpointer.list_steps())


# ---- the tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writers", "readers", "asynchronous"), [(4, 2, True), (2, 4, False), (4, 1, True), (1, 4, True)]
)
def test_any_layout_reads_what_any_wrote(tmp_path: Path, writers: int, readers: int, asynchronous: bool) -> None:
    run_ranks(save_all, world_size=writers, arguments=(str(tmp_path), writers, asynchronous))
    run_ranks(load_all, world_size=readers, arguments=(str(tmp_path), readers))
    for step, layout in enumerate(LAYOUTS, start=1):
        restored = load_checkpoint(tmp_path / layout)
        assert restored.tensors.keys() == model().keys()
        check([whole_piece(name, tensor) for name, tensor in restored.tensors.items()], step=step + 2)


def test_what_several_hold_is_written_once_and_by_all(tmp_path: Path) -> None:
    run_ranks(save_all, world_size=2, arguments=(str(tmp_path), 2, False))
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / "replicated" / "step_00000002").glob(f"*.{rank:05d}.*"))
        for rank in range(2)
    ]
    total = sum(tensor.numel() * tensor.element_size() for tensor in model().values())
    assert sum(sizes) < total + 4 * 600 and min(sizes) > 0.4 * max(sizes)


def test_all_ranks_pass_over_damaged_checkpoints_alike(tmp_path: Path) -> None:
    results = run_ranks(fall_back, world_size=4, arguments=(str(tmp_path / "c"),))
    assert all(result == results[0] for result in results)
    step, messages = results[0]
    assert step == 1 and len(messages) == 2
    assert "task.00001.safetensors" in messages[1] and "SHA-256" in messages[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_of_one_rank_is_one_line_on_all(tmp_path: Path, asynchronous: bool) -> None:
    messages = run_ranks(run_out_of_space, world_size=2, arguments=(str(tmp_path / "c"), asynchronous))
    assert messages[0] == messages[1]
    assert messages[0].endswith(
        "step_00000002: must be written whole, but is not: No space left on device on rank 1. "
        "Older checkpoints are untouched; make room or mend the disk."
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("overlap", "pieces of task.w: must make up one tensor exactly over all ranks, but is overlapping: "),
        ("gap", "pieces of task.w: must make up one tensor exactly over all ranks, but is without 2 of its 12"),
        ("type", "but is torch.float32 [4, 3] on one and torch.bfloat16 [4, 3] on another"),
        ("nan", "task.w: must be finite to be saved, but has nan or inf"),
        ("state", "checkpoint state: must be JSON values"),
    ],
)
def test_what_cannot_be_saved_is_an_error_on_all(tmp_path: Path, kind: str, text: str) -> None:
    messages = run_ranks(save_wrong, world_size=2, arguments=(str(tmp_path / "c"), kind))
    assert messages[0] == messages[1]
    assert text in messages[0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("unknown", "must hold this model's tensors, but task.other is not in it. Use the params"),
        ("missing", "task.cube is only in it"),
        ("shape", "task.cube is torch.float32 [3, 4, 5] instead of torch.float32 [3, 4, 6]"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_line_on_all(tmp_path: Path, kind: str, text: str) -> None:
    messages = run_ranks(load_wrong, world_size=2, arguments=(str(tmp_path / "c"), kind))
    assert messages[0] == messages[1]
    assert text in messages[0]


def test_saving_does_not_meet_the_collectives_of_training(tmp_path: Path) -> None:
    assert run_ranks(collide, world_size=2, arguments=(str(tmp_path / "c"),)) == [2, 2]


def hang_up() -> None:
    """Breaks all connections of this process, as its end would."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.getpeername()  # Fails for one that listens, which gloo would take amiss.
                    connection.shutdown(socket.SHUT_RDWR)


def part_ways(rank: int, folder: str) -> str:
    ranks = Ranks()
    checkpointer = build(folder, ranks=ranks)
    pieces = cut(model(1), layout="zero", rank=rank, size=ranks.size)
    checkpointer.save(step=1, tensors=pieces, state={}, wait=True)
    if rank == 1:
        hang_up()
        return ""
    with pytest.raises(CheckpointError) as caught:
        checkpointer.save(step=2, tensors=pieces, state={}, wait=True)
    return str(caught.value)


def test_a_lost_rank_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    said = run_ranks(part_ways, world_size=2, arguments=(str(tmp_path / "c"),))[0]
    assert "must be agreed on by 2 ranks, but is without an answer from another" in said and "\n" not in said
    check([whole_piece(*item) for item in load_checkpoint(tmp_path / "c" / "step_00000001").tensors.items()], step=1)


def start_warm(rank: int, folder: str, size: int) -> tuple[str, int]:
    """Begins with another run's tensors under other names; only some ranks hold those that a rule is for."""
    ranks = Ranks()
    pieces = cut(model(0), layout="pipe", rank=rank, size=size)
    pieces = [replace(piece, name=piece.name.replace("task.", "task.new.")) for piece in pieces]
    kept = {piece.name: piece.tensor.clone() for piece in pieces}
    rules = [("cube", "never"), (r"^task\.new\.(fused|norm|embedding)", r"task.\1")]
    with pytest.raises(CheckpointError) as caught:
        init_from(folder, named_parameters=pieces, rules=rules, ranks=ranks)
    assert all(torch.equal(piece.tensor, kept[piece.name]) for piece in pieces), "some were loaded, others not"
    report = init_from(folder, named_parameters=pieces, rules=rules[1:], ranks=ranks)
    for piece in pieces:
        if piece.name in report.loaded:
            check([replace(piece, name=report.loaded[piece.name])], step=7)
        else:
            assert torch.equal(piece.tensor, kept[piece.name])
    return str(caught.value), len(report.loaded)


def test_runs_of_many_ranks_start_warm(tmp_path: Path) -> None:
    checkpointer = Checkpointer.Params().instantiate(directory=tmp_path)
    checkpointer.save(step=1, tensors=model(7), state={}, wait=True)
    results = run_ranks(start_warm, world_size=2, arguments=(str(tmp_path), 2))
    assert results[0] == results[1]
    assert "task.new.never, for task.new.cube, is not in it. Mend the rules." in results[0][0]
    assert results[0][1] == 3
