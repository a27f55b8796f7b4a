"""What the tests of launchers share: a small run, programs on the PATH, and waiting for what a run does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaseq.train.tracking.jsonl import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = (
    "quickstart.Numbers",
    "train.log_interval_steps=1",
    "train.eval_interval_steps=0",
    "train.eval_at_end=false",
    "train.decode_at_end=false",
    "train.num_threads=1",
    "train_input.source.num_examples=2000",
    "train_input.batching.rows=4",
    "eval_inputs.held_out.source.num_examples=8",
    "task.model_dim=32",
    "task.encoder.num_layers=1",
    "task.decoder.num_layers=1",
    "task.search.target_seq_len=8",
    "parallel.timeout_seconds=120.0",
)
"""A run whose steps take milliseconds."""

FAKE_PDSH = f"""#!{sys.executable}
# Runs the command once for each host of -w, with %n replaced by the host's number; ends with the largest exit code.
import subprocess, sys
arguments = sys.argv[1:]
hosts = arguments[arguments.index("-w") + 1].split(",")
command = arguments[arguments.index("-w") + 2 :]
running = [
    subprocess.Popen(["bash", "-c", " ".join(command).replace("%n", str(number)).replace("%h", host)])
    for number, host in enumerate(hosts)
]
sys.exit(max(process.wait() for process in running))
"""

FAKE_SRUN = f"""#!{sys.executable}
# Runs the command as SLURM_NTASKS tasks with what Slurm tells each, on FAKE_NODES nodes; passes signals on. As since
# Slurm 22.05, a task has the cores of --cpus-per-task or SRUN_CPUS_PER_TASK, else one, whatever the job was given.
import os, signal, subprocess, sys
arguments = sys.argv[1:]
tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("FAKE_NODES", "1"))
cores = os.environ.get("SRUN_CPUS_PER_TASK", "1")
while arguments[0].startswith("-"):
    if arguments[0].startswith("--cpus-per-task="):
        cores = arguments[0].partition("=")[2]
    if arguments[0] == "-n":
        tasks = int(arguments[1])
        del arguments[0]
    del arguments[0]
each = tasks // nodes
running = []
for rank in range(tasks):
    running.append(
        subprocess.Popen(
            arguments,
            start_new_session=True,
            env=os.environ
            | {{
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % each),
                "SLURM_NODEID": str(rank // each),
                "SLURM_STEP_ID": "0",
                "SLURM_CPUS_PER_TASK": cores,
                "SLURM_STEP_NUM_TASKS": str(tasks),
                "SLURM_STEP_TASKS_PER_NODE": f"{{each}}(x{{nodes}})",
                "SLURM_STEP_NODELIST": "localhost" if nodes == 1 else "localhost,localhost2",
            }},
        )
    )
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [process.send_signal(number) for process in running])
sys.exit(max(abs(process.wait()) for process in running))
"""

FAKE_SSH = """#!/bin/sh
# Answers what `megaseq hosts` and the DeepSpeed launcher ask.
case "$*" in *nvidia-smi*) printf "0\\n64\\n";; *) echo 127.0.0.1;; esac
"""

FAKE_SBATCH = """#!/bin/sh
# Runs the script here, with one task for each of --nodes.
export SLURM_NTASKS="${1#--nodes=}" SLURM_JOB_ID=$$ SLURM_PROCID=0
shift
exec bash "$@"
"""

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(programs: Path | None = None, **more: str) -> dict[str, str]:
    """Returns an environment without a launcher's variables, with `programs` first on its PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    path = [str(Path(sys.executable).parent), kept["PATH"]]
    if programs is not None:
        path.insert(0, str(programs))
    return kept | {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def write_program(path: Path, text: str) -> None:
    """Writes an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def write_megaseq(programs: Path) -> None:
    """Writes a `megaseq` and a `python` that are those of the tests."""
    write_program(programs / "megaseq", f'#!/bin/sh\nexec "{sys.executable}" -m megaseq "$@"\n')
    write_program(programs / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Returns whether somebody listens at a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def start(command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, its output in the file `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env=dict(env), cwd=ROOT, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], *, log: Path, timeout_seconds: float = 400) -> tuple[int, str]:
    """Waits for a command and everything it has started; returns its exit code and its output."""
    try:
        code = process.wait(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done in {timeout_seconds} s:\n{log.read_text()[-4000:]}") from None
    finally:
        kill_session(process)
    return code, log.read_text()


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a command that `start` has started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def train(run_dir: Path, *, cache: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Returns the arguments of `megaseq` that train the small run."""
    return ["train", *SMALL, f"train.cache_dir={cache}", *overrides, "--run-dir", str(run_dir)]


def run_megaseq(
    arguments: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, timeout_seconds: float = 400
) -> tuple[int, str]:
    """Runs `megaseq ARGUMENTS` to its end; returns exit code and output."""
    command = [sys.executable, "-m", "megaseq", *arguments]
    process = start(command, log=log, env=environment() if env is None else env)
    return finish(process, log=log, timeout_seconds=timeout_seconds)


def losses(run_dir: Path) -> dict[int, float]:
    """Returns the training loss by step, the last one that was logged."""
    return {row["step"]: row["train/loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in row}


def status(run_dir: Path) -> dict[str, Any]:
    """Returns what status.json says."""
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


def wait_for(
    condition: Callable[[], bool], *, process: subprocess.Popen[bytes], log: Path, timeout_seconds: float = 400
) -> None:
    """Waits until the condition holds; fails when the process ends before, or in `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_session(process)
            raise AssertionError(log.read_text()[-4000:] or "nothing was written")
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Returns the processes below `pid`, by number."""
    found: list[int] = []
    listed = Path("/proc").glob("[0-9]*/stat")
    parents: dict[int, list[int]] = {}
    for path in listed:
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return sorted(found)


def rank_processes(pid: int) -> dict[int, int]:
    """Returns the processes below `pid` that train, by rank."""
    found: dict[int, int] = {}
    for child in descendants(pid):
        try:
            variables = dict(
                entry.partition("=")[::2]
                for entry in (Path("/proc") / str(child) / "environ").read_bytes().decode().split("\0")
            )
            command = (Path("/proc") / str(child) / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        rank = variables.get("RANK", variables.get("SLURM_PROCID"))
        if rank is not None and "megaseq" in command and "train" in command:
            found[int(rank)] = child
    return found
