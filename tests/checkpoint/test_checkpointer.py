"""Saving, restoring, retention and falling back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaseq.base import CheckpointError, ParamsError
from megaseq.checkpoint import Checkpointer, DamagedError, load_checkpoint
from megaseq.checkpoint.piece import Piece

from .conftest import assert_same, make_tensors, save

Make = Callable[..., Checkpointer]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_bit_by_bit(make: Make, asynchronous: bool) -> None:
    checkpointer = make(asynchronous=asynchronous)
    state = {"float": 0.1, "int": 2**60, "nested": [None, True, {"a": "ü"}], "inf": float("inf")}
    files = {"params.txt": b"text", "tokenizer/source.model": bytes(range(256))}
    checkpointer.save(step=12, tensors=make_tensors(), state=state, files=files, metrics={"bleu": 31.25})
    restored = checkpointer.restore()
    assert_same(restored.tensors, make_tensors())
    assert (restored.step, restored.state, restored.files) == (12, state, files)
    assert restored.metrics == {"bleu": 31.25}
    assert (restored.path, restored.messages) == (checkpointer.path(12), ())
    assert checkpointer.latest() == 12


def test_tensors_are_loaded_in_place(make: Make) -> None:
    checkpointer = make()
    expected = save(checkpointer, 1)
    own = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    restored = checkpointer.restore(tensors=own)
    assert_same(own, expected)
    assert all(restored.tensors[name] is own[name] for name in own)


def test_copies_are_read_and_not_written(make: Make) -> None:
    checkpointer = make()
    values = torch.arange(10.0)
    pieces = [Piece("w", (10,), (0,), values[:6]), Piece("w", (10,), (6,), values[6:])]
    # As another stage may have it, in other pieces.
    copies = [Piece("w", (10,), (start,), torch.zeros(stop - start), is_copy=True) for start, stop in ((0, 3), (3, 10))]
    checkpointer.save(step=1, tensors=[*copies, *pieces], state={})
    checkpointer.restore(tensors=[*copies, *pieces])
    assert torch.equal(torch.cat([piece.tensor for piece in copies]), values)


def test_prefixes_choose_tensors_and_spare_the_other_files(make: Make) -> None:
    checkpointer = make()
    expected = save(checkpointer, 1)
    damage = checkpointer.path(1) / "learner.00000.safetensors"
    content = bytearray(damage.read_bytes())
    content[-1] ^= 1
    damage.write_bytes(content)
    restored = checkpointer.restore(prefixes=("task.",))
    assert_same(restored.tensors, {name: tensor for name, tensor in expected.items() if name.startswith("task.")})
    with pytest.raises(CheckpointError, match=r"learner\.00000\.safetensors"):
        checkpointer.restore()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda own: own.pop("task.count"), "task.count is only in it"),
        (lambda own: own.update({"task.new": torch.ones(1)}), "task.new is not in it"),
        (lambda own: own.update({"task.count": torch.ones(3)}), r"torch.int64 \[3\] instead of torch.float32 \[3\]"),
        (lambda own: own.update({"task.mask": torch.ones(2).bool()}), r"torch.bool \[3\] instead of torch.bool \[2\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_loaded(make: Make, change: Any, text: str) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    own = {name: torch.zeros_like(tensor) for name, tensor in save(checkpointer, 2).items()}
    change(own)
    before = {name: tensor.clone() for name, tensor in own.items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        checkpointer.restore(tensors=own)
    assert not isinstance(caught.value, DamagedError)
    assert_same(own, before)


def test_an_asynchronous_save_keeps_the_values_of_its_moment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    checkpointer = make()
    write = Checkpointer._write

    def held(self: Checkpointer, content: Any) -> None:
        go.wait(30)
        write(self, content)

    monkeypatch.setattr(Checkpointer, "_write", held)
    tensors, state = make_tensors(), {"n": [1]}
    checkpointer.save(step=1, tensors=tensors, state=state)
    assert checkpointer.list_steps() == []
    state["n"].append(2)
    for tensor in tensors.values():
        tensor.zero_()
    go.set()
    restored = checkpointer.restore()
    assert_same(restored.tensors, make_tensors())
    assert restored.state == {"n": [1]}


def test_the_stall_is_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = make()
    write = Checkpointer._write

    def slow(self: Checkpointer, content: Any) -> None:
        threading.Event().wait(0.5)
        write(self, content)

    monkeypatch.setattr(Checkpointer, "_write", slow)
    checkpointer.save(step=1, tensors=make_tensors(), state={})
    first = checkpointer.stall_seconds
    assert first < 0.4
    checkpointer.save(step=2, tensors=make_tensors(), state={})
    assert checkpointer.stall_seconds > 0.2
    assert checkpointer.total_stall_seconds == pytest.approx(first + checkpointer.stall_seconds)
    checkpointer.wait()


def test_an_error_in_the_background_is_raised_once_and_later_saves_work(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        checkpointer.save(step=2, tensors=make_tensors(), state={})
        with pytest.raises(CheckpointError, match=r"step_00000002: must be written whole.*No space left on device"):
            checkpointer.wait()
        checkpointer.save(step=3, tensors=make_tensors(), state={})
        with pytest.raises(CheckpointError, match="step_00000003: must be written whole"):
            checkpointer.save(step=4, tensors=make_tensors(), state={})
    checkpointer.wait()
    assert os.listdir(checkpointer.directory) == ["step_00000001"]
    expected = save(checkpointer, 5)
    assert_same(checkpointer.restore().tensors, expected)
    assert checkpointer.list_steps() == [1, 5]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_values_that_are_not_finite_are_not_saved(make: Make, asynchronous: bool) -> None:
    checkpointer = make(asynchronous=asynchronous)
    expected = save(checkpointer, 1)
    tensors = make_tensors()
    tensors["ema.task.encoder.weight"][3, 3] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"ema\.task\.encoder\.weight: must be finite to be saved, but has nan or inf"
    ):
        checkpointer.save(step=2, tensors=tensors, state={})
        checkpointer.wait()
    assert os.listdir(checkpointer.directory) == ["step_00000001"]
    assert_same(checkpointer.restore().tensors, expected)
    lenient = make(check_finite=False)
    lenient.save(step=2, tensors=tensors, state={})
    assert lenient.restore().tensors["ema.task.encoder.weight"].isnan().sum() == 1


def test_a_state_that_is_not_json_is_refused(make: Make) -> None:
    with pytest.raises(CheckpointError, match="state: must be JSON values"):
        make().save(step=1, tensors={}, state={"tensor": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"file '\.\./x': must be a relative path"):
        make(asynchronous=False).save(step=1, tensors={}, state={}, files={"../x": b""})


def test_saving_a_step_again_replaces_it(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    checkpointer.save(step=1, tensors=make_tensors(9), state={"again": True})
    restored = checkpointer.restore()
    assert_same(restored.tensors, make_tensors(9))
    assert restored.state == {"again": True}
    assert os.listdir(checkpointer.directory) == ["step_00000001"]


def test_should_save_at_the_interval_and_once_a_step(make: Make) -> None:
    checkpointer = make(interval_steps=10)
    assert [step for step in range(31) if checkpointer.should_save(step)] == [10, 20, 30]
    save(checkpointer, 10)
    assert not checkpointer.should_save(10)
    assert not make(interval_steps=0).should_save(10)


def test_retention(make: Make) -> None:
    checkpointer = make(keep_last=2, keep_every_steps=30, keep_best=2, best_metric="bleu")
    bleu = {10: 5.0, 20: 9.0, 30: 1.0, 40: 8.0, 50: float("nan"), 60: 2.0, 70: 3.0, 80: 4.0}
    for step, value in bleu.items():
        save(checkpointer, step, bleu=value)
    assert checkpointer.list_steps() == [20, 30, 40, 60, 70, 80]
    assert checkpointer.best() == 20
    again = make(keep_last=2, keep_every_steps=30, keep_best=2, best_metric="bleu", best_mode="min")
    assert again.best() == 30


def test_metrics_may_follow_the_save(make: Make) -> None:
    checkpointer = make(keep_last=1, keep_best=1, best_metric="loss", best_mode="min")
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0)):
        save(checkpointer, step)
        checkpointer.record_metrics(step=step, metrics={"loss": loss})
    assert checkpointer.list_steps() == [2, 4]
    assert checkpointer.best() == 2


def test_keep_last_zero_keeps_all(make: Make) -> None:
    checkpointer = make(keep_last=0)
    for step in range(1, 6):
        save(checkpointer, step)
    assert checkpointer.list_steps() == [1, 2, 3, 4, 5]


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


ALL_FILES = (
    "manifest.json",
    "tensors.json",
    "state.json",
    "files/a/b.txt",
    "task.00000.safetensors",
    "learner.00000.safetensors",
    "ema.00000.safetensors",
)


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes instead of|is not JSON"),
        (flip, "SHA-256|is not JSON|checksum|not a megaseq"),
        (Path.unlink, "is missing|cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(make: Make, name: str, damage: Any, reason: str) -> None:
    checkpointer = make()
    expected = save(checkpointer, 1)
    save(checkpointer, 2)
    damage(checkpointer.path(2) / name)
    own = {tensor_name: torch.zeros_like(tensor) for tensor_name, tensor in expected.items()}
    restored = checkpointer.restore(tensors=own)
    assert restored.step == 1
    assert_same(own, expected)
    (message,) = restored.messages
    assert str(checkpointer.path(2) / name) in message
    assert any(word in message for word in reason.split("|"))
    assert "\n" not in message


def test_a_whole_checkpoint_has_exactly_these_files(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    root = checkpointer.path(1)
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == set(ALL_FILES)


def test_all_damaged_and_none_at_all(make: Make) -> None:
    checkpointer = make()
    with pytest.raises(CheckpointError, match="must have a checkpoint to restore, but has none"):
        checkpointer.restore()
    for step in (1, 2):
        save(checkpointer, step)
        truncate(checkpointer.path(step) / "task.00000.safetensors")
    with pytest.raises(CheckpointError, match="must have a whole checkpoint, but all 2 are damaged"):
        checkpointer.restore()
    with pytest.raises(DamagedError, match="step_00000001"):
        checkpointer.restore(step=1)


def test_damaged_checkpoints_do_not_count_as_kept(make: Make) -> None:
    checkpointer = make(keep_last=2)
    for step in (1, 2, 3):
        save(checkpointer, step)
    flip(checkpointer.path(3) / "state.json")
    assert checkpointer.restore().step == 2
    save(checkpointer, 4)
    assert checkpointer.list_steps() == [2, 4]


def test_what_a_killed_process_left_is_cleaned(make: Make, folder: Path) -> None:
    checkpointer = make()
    expected = save(checkpointer, 1)
    (folder / ".writing-step_00000002-0a1b2c3d").mkdir()
    (folder / ".deleted-step_00000000-0a1b2c3d").mkdir()
    os.replace(folder / "step_00000001", folder / ".replaced-step_00000001")
    make(read_only=True)
    assert len(os.listdir(folder)) == 3
    restored = make().restore()
    assert os.listdir(folder) == ["step_00000001"]
    assert_same(restored.tensors, expected)


def test_a_reader_does_not_write(make: Make) -> None:
    save(make(), 1)
    reader = make(read_only=True)
    assert reader.restore().step == 1
    with pytest.raises(CheckpointError, match="read-only"):
        reader.save(step=2, tensors={}, state={})


def test_paths_of_runs_and_folders_are_understood(make: Make, folder: Path) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    expected = save(checkpointer, 2)
    for path in (folder.parent, folder, folder / "step_00000002", str(folder.parent)):
        assert_same(load_checkpoint(path).tensors, expected)
    with pytest.raises(CheckpointError, match="must be a checkpoint, or a run directory with one"):
        load_checkpoint(folder.parent.parent)


def test_a_newer_format_is_refused_without_falling_back(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    path = checkpointer.path(1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="must have version 1, but is 99"):
        checkpointer.restore()


def test_bad_params() -> None:
    with pytest.raises(ParamsError, match="keep_last: must be at least 0"):
        Checkpointer.Params(keep_last=-1).instantiate(directory="x")
