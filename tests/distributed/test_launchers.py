"""Every launcher end to end: torchrun, the DeepSpeed launcher in all its ways, Slurm; no real cluster is needed.

Where a launcher would reach other machines, a program of the same name on the PATH runs what it is given here, so the
real command lines are read and executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import (
    FAKE_PDSH,
    FAKE_SRUN,
    FAKE_SSH,
    descendants,
    environment,
    finish,
    free_port,
    kill_session,
    listens,
    losses,
    rank_processes,
    start,
    status,
    train,
    wait_for,
    write_megaseq,
    write_program,
)

SHORT = ("train.max_steps=3",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token caches that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for the PATH, with `megaseq` and `python`."""
    write_megaseq(tmp_path / "bin")
    return tmp_path / "bin"


def check_three_steps(run_dir: Path, *, text: str) -> None:
    assert list(losses(run_dir)) == [1, 2, 3]
    assert status(run_dir) == {"status": "finished", "step": 3}
    assert text.count("begins in") == 1


@pytest.mark.slow
def test_torchrun(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    env = environment(programs, MEGASEQ_PROCESSES="2")
    command = ["bash", "launch/torchrun.sh", *train(run_dir, cache=cache, overrides=SHORT)[1:]]
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    assert "2 processes on 1 machine (cpu), started by torchrun: data=2" in text
    check_three_steps(run_dir, text=text)


@pytest.mark.slow
def test_deepspeed_on_one_machine_of_a_hostfile(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log, hostfile = tmp_path / "run", tmp_path / "log", tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    env = environment(programs, MEGASEQ_DEEPSPEED="--no_ssh_check --master_addr 127.0.0.1")
    overrides = (*SHORT, "-c", "configs/cluster/zero1.yaml")
    command = ["bash", "launch/deepspeed.sh", str(hostfile), *train(run_dir, cache=cache, overrides=overrides)[1:]]
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    assert "localhost: 2 processes, " in text
    assert "2 processes on 1 machine (cpu), started by deepspeed: data=2" in text
    check_three_steps(run_dir, text=text)


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        ("", "hosts FILE quickstart.Numbers -c a.yaml seed=2 --run-dir runs/a"),
        ("--launcher slurm", "hosts FILE quickstart.Numbers -c a.yaml seed=2 --run-dir runs/a"),
        ("--no_ssh_check --num_nodes 1", "hosts FILE"),
        ("--include=worker-0", "hosts FILE"),
        ("-e worker-0", "hosts FILE"),
    ],
)
def test_deepspeed_script_checks_the_run_that_it_starts(
    options: str, checked: str, tmp_path: Path, programs: Path
) -> None:
    log = tmp_path / "log"
    write_program(programs / "megaseq", '#!/bin/sh\necho "$*"\n')
    write_program(programs / "deepspeed", '#!/bin/sh\necho "deepspeed $*"\n')
    run = "quickstart.Numbers -c a.yaml seed=2 --run-dir runs/a"
    env = environment(programs, MEGASEQ_DEEPSPEED=options)
    code, text = finish(start(["bash", "launch/deepspeed.sh", "FILE", *run.split()], log=log, env=env), log=log)
    assert code == 0, text
    started = " ".join(f"deepspeed --hostfile FILE {options} --module megaseq train {run}".split())
    assert text.splitlines() == [checked, started]


def test_deepspeed_script_starts_nothing_where_the_check_fails(tmp_path: Path, programs: Path) -> None:
    log = tmp_path / "log"
    write_program(programs / "megaseq", "#!/bin/sh\nexit 2\n")
    write_program(programs / "deepspeed", "#!/bin/sh\necho started\n")
    command = ["bash", "launch/deepspeed.sh", "FILE", "quickstart.Numbers"]
    assert finish(start(command, log=log, env=environment(programs)), log=log) == (2, "")


@pytest.mark.slow
def test_deepspeed_without_ssh_started_on_each_machine(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    options = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    logs = [tmp_path / f"log{node}" for node in range(2)]
    running = [
        start(
            [
                *("deepspeed", "--hostfile", str(hostfile), *options, "--node_rank", str(node), "--module", "megaseq"),
                *train(run_dir, cache=cache, overrides=SHORT),
            ],
            log=logs[node],
            env=environment(programs),
        )
        for node in range(2)
    ]
    for process, log in zip(running, logs, strict=True):
        code, text = finish(process, log=log)
        assert code == 0, text
    check_three_steps(run_dir, text=logs[0].read_text())
    assert "2 processes on 1 machine (cpu), started by deepspeed: data=2" in logs[0].read_text()
    assert "begins in" not in logs[1].read_text()


@pytest.mark.slow
def test_deepspeed_over_pdsh(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log, hostfile = tmp_path / "run", tmp_path / "log", tmp_path / "hostfile"
    hostfile.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    write_program(programs / "pdsh", FAKE_PDSH)
    write_program(programs / "ssh", FAKE_SSH)
    env = environment(programs)
    command = ["deepspeed", "--hostfile", str(hostfile), "--module", "megaseq"]
    command += train(run_dir, cache=cache, overrides=SHORT)
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    check_three_steps(run_dir, text=text)


@pytest.mark.slow
def test_deepspeed_over_slurm(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log, hostfile = tmp_path / "run", tmp_path / "log", tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\nlocalhost2 slots=1\n")
    write_program(programs / "srun", FAKE_SRUN)
    write_program(programs / "sinfo", "#!/bin/sh\n")
    write_program(programs / "ssh", FAKE_SSH)
    env = environment(programs, SLURM_NTASKS="2", SLURM_JOB_ID=str(os.getpid()), FAKE_NODES="2")
    command = ["deepspeed", "--hostfile", str(hostfile), "--launcher", "slurm", "--module", "megaseq"]
    command += train(run_dir, cache=cache, overrides=SHORT)
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    assert "2 processes on 1 machine (cpu), started by slurm: data=2" in text
    check_three_steps(run_dir, text=text)


def batch_environment(programs: Path, *, tmp_path: Path, tasks: int) -> dict[str, str]:
    """What sbatch gives the script of a job, and srun and scontrol for it."""
    write_program(programs / "srun", FAKE_SRUN)
    write_program(programs / "scontrol", f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path / "scontrol.txt"))}\n')
    return environment(
        programs,
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NTASKS=str(tasks),
        SLURM_PROCID="0",
        SLURM_JOB_NODELIST="localhost",
    )


@pytest.mark.parametrize(
    ("given", "cores"),
    [({"SLURM_CPUS_PER_TASK": "8"}, "8"), ({}, "1"), ({"SLURM_CPUS_PER_TASK": "8", "SRUN_CPUS_PER_TASK": "4"}, "4")],
)
def test_slurm_tasks_have_the_cores_that_the_job_was_given(
    given: dict[str, str], cores: str, tmp_path: Path, programs: Path
) -> None:
    log = tmp_path / "log"
    write_program(programs / "megaseq", '#!/bin/sh\necho "task $SLURM_PROCID: $SLURM_CPUS_PER_TASK cores: $*"\n')
    env = batch_environment(programs, tmp_path=tmp_path, tasks=2)
    env = {name: value for name, value in env.items() if "CPUS_PER_TASK" not in name} | given
    command = ["bash", "launch/slurm/train.sbatch", "quickstart.Numbers", "seed=2"]
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    assert sorted(text.splitlines()) == [f"task {n}: {cores} cores: train quickstart.Numbers seed=2" for n in range(2)]


@pytest.mark.slow
def test_slurm_requeues_and_goes_on(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    env = batch_environment(programs, tmp_path=tmp_path, tasks=2)
    command = [
        "bash",
        "launch/slurm/train.sbatch",
        *train(run_dir, cache=cache, overrides=("train.max_steps=100000",))[1:],
    ]
    process = start(command, log=log, env=env)
    wait_for(lambda: len(losses(run_dir)) > 2, process=process, log=log)
    os.kill(process.pid, signal.SIGUSR1)  # As --signal=B:USR1@300 does.
    code, text = finish(process, log=log)
    assert code == 0, text
    stopped = status(run_dir)
    assert stopped["status"] == "stopped"
    assert f"SIGUSR1: saved at step {stopped['step']}" in text
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"

    more = (f"train.max_steps={stopped['step'] + 2}",)
    command = ["bash", "launch/slurm/train.sbatch", *train(run_dir, cache=cache, overrides=more)[1:]]
    again = start([*command, "--allow-changed-params"], log=log, env=env | {"SLURM_RESTART_COUNT": "1"})
    code, text = finish(again, log=log)
    assert code == 0, text
    assert f"goes on from step {stopped['step']}" in text
    assert "started by slurm: data=2" in text
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1


@pytest.mark.slow
def test_a_slurm_task_for_each_machine_starts_its_processes(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    env = batch_environment(programs, tmp_path=tmp_path, tasks=2) | {"FAKE_NODES": "2"}
    overrides = (*SHORT, "parallel.processes=2")
    command = ["bash", "launch/slurm/train.sbatch", *train(run_dir, cache=cache, overrides=overrides)[1:]]
    code, text = finish(start(command, log=log, env=env), log=log)
    assert code == 0, text
    assert "4 processes on 1 machine (cpu), started by megaseq: data=4" in text
    check_three_steps(run_dir, text=text)
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.slow
def test_ranks_with_other_params_are_named(cache: Path, tmp_path: Path, programs: Path) -> None:
    port = str(free_port())
    running, logs = [], [tmp_path / f"log{rank}" for rank in range(2)]
    for rank in range(2):
        env = environment(
            programs, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        overrides = (*SHORT, f"learner.learning_rate=0.0{rank + 1}")
        command = [sys.executable, "-m", "megaseq", *train(tmp_path / "run", cache=cache, overrides=overrides)]
        running.append(start(command, log=logs[rank], env=env))
    ended = [finish(process, log=log) for process, log in zip(running, logs, strict=True)]
    assert [code for code, _ in ended] == [2, 2], ended
    said = "".join(text for _, text in ended)
    assert said == (
        "megaseq: parallel: must have the same params on all 2 ranks, but is given another on rank 1 than on rank 0. "
        "Start all ranks from the same installation with the same command line.\n"
    )
    assert not (tmp_path / "run").exists()


# ---- elastic ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_torchrun(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    env = environment(programs, MEGASEQ_PROCESSES="2", MEGASEQ_RESTARTS="1")
    overrides = ("train.max_steps=60", "checkpoint.interval_steps=2", "checkpoint.asynchronous=false")
    command = ["bash", "launch/torchrun.sh", *train(run_dir, cache=cache, overrides=overrides)[1:]]
    process = start(command, log=log, env=env)
    wait_for(lambda: len(losses(run_dir)) > 4, process=process, log=log)
    os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
    code, text = finish(process, log=log)
    assert code == 0, text
    assert "goes on from step" in text
    assert list(losses(run_dir)) == list(range(1, 61))
    assert status(run_dir) == {"status": "finished", "step": 60}


@pytest.mark.slow
def test_a_lost_machine_is_left_behind(cache: Path, tmp_path: Path, programs: Path) -> None:
    run_dir, logs = tmp_path / "run", [tmp_path / f"log{node}" for node in range(2)]
    port = free_port()
    env = environment(
        programs,
        MEGASEQ_PROCESSES="1",
        MEGASEQ_NODES="1:2",
        MEGASEQ_RENDEZVOUS=f"localhost:{port}",
    )
    overrides = ("train.max_steps=100000", "checkpoint.interval_steps=2", "checkpoint.asynchronous=false")
    command = ["bash", "launch/torchrun.sh", *train(run_dir, cache=cache, overrides=overrides)[1:]]
    running = [start(command, log=logs[0], env=env)]
    # Who comes first keeps the meeting point; it is the other one that may be lost.
    wait_for(lambda: listens(port), process=running[0], log=logs[0])
    running.append(start(command, log=logs[1], env=env))
    two = "2 processes on 1 machine (cpu), started by torchrun: data=2"
    # The first one may have begun alone; and which of them has rank 0, and says so, is torchrun's choice.
    wait_for(lambda: any(two in log.read_text() for log in logs), process=running[0], log=logs[0])
    begun = max(losses(run_dir), default=0)
    wait_for(lambda: max(losses(run_dir), default=0) > begun + 4, process=running[0], log=logs[0])
    said = len(logs[0].read_text())
    for pid in [*descendants(running[1].pid), running[1].pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running[1].wait()
    wait_for(lambda: "goes on from step" in logs[0].read_text()[said:], process=running[0], log=logs[0])
    seen = max(losses(run_dir))
    wait_for(lambda: max(losses(run_dir)) > seen + 3, process=running[0], log=logs[0])
    os.kill(rank_processes(running[0].pid)[0], signal.SIGTERM)
    wait_for(lambda: status(run_dir)["status"] == "stopped", process=running[0], log=logs[0])
    kill_session(running[0])
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
