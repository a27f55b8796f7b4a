"""`megaseq train parallel.data=2`: it starts the processes itself, and they end together, however they end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launching import (
    environment,
    finish,
    losses,
    rank_processes,
    run_megaseq,
    start,
    status,
    train,
    wait_for,
)

TWO = ("parallel.data=2",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token caches that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "tensor", "pipe"])
def test_two_processes_train_as_one(axis: str, cache: Path, tmp_path: Path) -> None:
    # Where the processor has bfloat16, `auto` takes it, and what its rounding does depends on the layout.
    short = ("train.max_steps=4", "train.precision=fp32", "task.decoder.dropout=0.1", "task.encoder.dropout=0.1")
    full = (*short, "train.eval_at_end=true", "train.decode_at_end=true")
    code, text = run_megaseq(train(tmp_path / "one", cache=cache, overrides=full), log=tmp_path / "one.log")
    assert code == 0, text
    two = (*full, f"parallel.{axis}=2")
    code, text = run_megaseq(train(tmp_path / "two", cache=cache, overrides=two), log=tmp_path / "two.log")
    assert code == 0, text
    assert text.count("begins in") == 1
    assert f"2 processes on 1 machine (cpu), started by megaseq: {axis}=2" in text
    assert f"rank 1 on {os.uname().nodename}, cpu: {axis} 1" in text
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(ours) == [1, 2, 3, 4]
    assert [ours[step] for step in ours] == pytest.approx([theirs[step] for step in ours], rel=1e-5)
    found = [sorted((tmp_path / run / "decodes").rglob("held_out.*")) for run in ("one", "two")]
    assert [path.name for path in found[0]] == [path.name for path in found[1]]
    for one, two_ranks in zip(*found, strict=True):
        if one.suffix == ".txt":
            assert one.read_text() == two_ranks.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("who", "number"), [(0, signal.SIGUSR1), (1, signal.SIGTERM), (None, signal.SIGINT)])
def test_a_signal_to_one_stops_all_at_one_step(
    who: int | None, number: signal.Signals, cache: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    endless = (*TWO, "train.max_steps=100000")
    process = start(
        [sys.executable, "-m", "megaseq", *train(run_dir, cache=cache, overrides=endless)], log=log, env=environment()
    )
    wait_for(lambda: len(losses(run_dir)) > 3, process=process, log=log)
    os.kill(process.pid if who is None else rank_processes(process.pid)[who], number)
    asked = time.monotonic()
    code, text = finish(process, log=log)
    assert code == 0, text
    assert time.monotonic() - asked < 90
    stopped = status(run_dir)
    assert stopped["status"] == "stopped"
    assert text.count(f"{number.name}: saved at step {stopped['step']}") == 1
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{stopped['step']:08}"]
    more = (*TWO, f"train.max_steps={stopped['step'] + 2}")
    code, text = run_megaseq([*train(run_dir, cache=cache, overrides=more), "--allow-changed-params"], log=log)
    assert code == 0, text
    assert f"goes on from step {stopped['step']}" in text


@pytest.mark.slow
def test_a_signal_to_one_before_the_first_step_ends_all(cache: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    long = (*TWO, "train.max_steps=100000", "train_input.source.num_examples=400000")
    process = start(
        [sys.executable, "-m", "megaseq", *train(run_dir, cache=tmp_path / "cache", overrides=long)],
        log=log,
        env=environment(),
    )
    wait_for((run_dir / "params.yaml").exists, process=process, log=log)
    time.sleep(2.0)
    os.kill(rank_processes(process.pid)[1], signal.SIGTERM)
    code, text = finish(process, log=log)
    assert code == 0, text
    assert text.count("SIGTERM: nothing to save yet, the same command begins again") == 1
    assert "Traceback" not in text
    assert not losses(run_dir)


@pytest.mark.slow
def test_a_killed_rank_ends_all_with_its_code(cache: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    endless = (*TWO, "train.max_steps=100000")
    process = start(
        [sys.executable, "-m", "megaseq", *train(run_dir, cache=cache, overrides=endless)], log=log, env=environment()
    )
    wait_for(lambda: len(losses(run_dir)) > 1, process=process, log=log)
    os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
    code, text = finish(process, log=log, timeout_seconds=120)
    assert code == 128 + signal.SIGKILL, text
    assert "megaseq: rank 1 was ended by SIGKILL, the others leave" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_an_error_is_told_once(cache: Path, tmp_path: Path) -> None:
    wrong = (*TWO, "train.max_steps=4", "vocabulary.source.vocab_size=5000")
    code, text = run_megaseq(train(tmp_path / "run", cache=cache, overrides=wrong), log=tmp_path / "log")
    assert code == 2
    assert [line[:50] for line in text.splitlines() if line.startswith("megaseq: ")] == [
        "megaseq: vocabulary.source.vocab_size: must suit t"
    ], text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_rank_that_stands_still_is_reported_by_those_that_wait(cache: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    endless = (*TWO, "train.max_steps=100000", "parallel.timeout_seconds=20.0")
    process = start(
        [sys.executable, "-m", "megaseq", *train(run_dir, cache=cache, overrides=endless)], log=log, env=environment()
    )
    wait_for(lambda: len(losses(run_dir)) > 1, process=process, log=log)
    stopped = rank_processes(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    code, text = finish(process, log=log, timeout_seconds=200)
    assert code == 3, text
    assert "megaseq: rank 0 has stood still for 2" in text
    assert "in train_step" in text or "in end_step" in text


def test_what_no_launcher_has_set_is_refused_before_anything_starts(tmp_path: Path, cache: Path) -> None:
    arguments = train(tmp_path / "run", cache=cache, overrides=("train.max_steps=4", "parallel.tensor=2"))
    env = environment(RANK="0", WORLD_SIZE="3", MASTER_PORT="1")
    code, text = run_megaseq(arguments, log=tmp_path / "log", env=env)
    assert code == 2
    assert (
        text
        == "megaseq: MASTER_ADDR: must be set by the launcher, but is missing. Export it, or start with torchrun.\n"
    )
