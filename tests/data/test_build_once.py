"""Directories built once, with real processes that run at the same time or are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkProcess as Process
from pathlib import Path

import pytest

from megaseq.base.errors import DataError
from megaseq.data.build_once import build_once, is_complete, list_files

FORK = multiprocessing.get_context("fork")
"""Real processes that need not import everything again."""
RESULT = "x" * 1000 + "y"


def build_slowly(directory: Path, log: Path, pause: float, result: Path) -> None:
    def build(temporary: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        (temporary / "first").write_text("x" * 1000)
        time.sleep(pause)
        (temporary / "second").write_text("y")

    build_once(directory, build=build, what="thing")
    result.write_text((directory / "first").read_text() + (directory / "second").read_text())


def start(directory: Path, log: Path, pause: float, result: Path | None = None) -> Process:
    result = directory.with_name("result") if result is None else result
    process = FORK.Process(target=build_slowly, args=(directory, log, pause, result))
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def kill(process: Process) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)


def test_processes_at_the_same_time_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = [tmp_path / f"result{i}" for i in range(4)]
    processes = [start(tmp_path / "made" / "it", log, 0.3, result) for result in results]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert {result.read_text() for result in results} == {RESULT}
    assert len(log.read_text().split()) == 1


def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    directory, log = tmp_path / "it", tmp_path / "log"
    process = start(directory, log, 60.0)
    wait_for(log)
    time.sleep(0.1)
    waiting = start(directory, log, 0.0)
    kill(process)
    waiting.join(timeout=60)
    assert (tmp_path / "result").read_text() == RESULT
    assert len(log.read_text().split()) == 2
    assert is_complete(directory)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_leftover_without_a_waiter(tmp_path: Path) -> None:
    directory, log = tmp_path / "it", tmp_path / "log"
    process = start(directory, log, 60.0)
    wait_for(log)
    kill(process)
    assert not directory.exists() and not is_complete(directory)
    build_once(directory, build=lambda temporary: (temporary / "a").touch(), what="thing")
    assert list_files(directory) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "it.lock", "log"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_noticed_and_mended(tmp_path: Path, damage: str) -> None:
    def build(temporary: Path) -> None:
        (temporary / "a").write_text("content")

    directory = build_once(tmp_path / "it", build=build, what="thing")
    if damage == "truncate":
        (directory / "a").write_text("cont")
    elif damage == "remove":
        (directory / "a").unlink()
    else:
        (directory / "manifest.json").write_text("[1")
    assert not is_complete(directory)
    build_once(directory, build=build, what="thing")
    assert is_complete(directory) and (directory / "a").read_text() == "content"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def build(temporary: Path) -> None:
        (temporary / "a").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "it", build=build, what="thing")
    assert [path.name for path in tmp_path.iterdir()] == ["it.lock"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    def build(temporary: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(DataError, match=r"must be writable, to keep the thing, but is not \(Permission denied"):
        build_once(tmp_path / "it", build=build, what="thing")
