"""Workers with models: what they begin with, exchange and end with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megaseq.base.errors import ParamsError, TrainingError
from megaseq.learner import SGD, Constant, Learner
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.place import Place
from megaseq.parallel.process import Team, current_team
from megaseq.train.engine import Engine
from megaseq.train.local_sgd.params import LocalSGD
from megaseq.train.local_sgd.server import OuterServer
from megaseq.train.local_sgd.worker import Worker
from megaseq.train.tracking.jsonl import read_metrics
from megaseq.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.train.tiny import random_batch, run_params, task_params

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server() -> Iterator[OuterServer]:
    made = OuterServer("127.0.0.1:0")
    made.start()
    yield made
    made.close()


def make_engine(*, mesh: Mesh | None = None, parallel: Parallel.Params | None = None) -> Engine:
    task = task_params(source_vocab_size=30, target_vocab_size=30)
    learner = Learner.Params(learning_rate=0.1, schedule=Constant.Params(), optimizer=SGD.Params())
    return Engine(task, learner_params=learner, seed=1, precision="fp32", mesh=mesh, parallel=parallel)


def values(engine: Engine) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.task.parameters()])


def in_threads(work: Callable[[int], Any], *, count: int) -> list[Any]:
    """Calls `work` with each index at once."""
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[index] for index in range(count)]


def train(index: int, *, server: OuterServer, steps: int = 4, **settings: Any) -> torch.Tensor:
    """Trains worker `index` of two; returns its parameters."""
    engine = make_engine()
    local = LocalSGD.Params(**{"workers": 2, "worker": index, "address": server.address, **settings})
    worker = Worker.of(local, engine=engine, team=Team(Place()))
    assert worker is not None
    worker.join()
    for step in range(steps):
        engine.train_step(random_batch(seed=10 * step + index), step=step)
        worker.after_step(last=step + 1 == steps)
    figures = worker.figures()
    assert figures["local_sgd/sent_bytes"] > 0 and figures["local_sgd/exchanges"] > 0
    worker.leave(finished=True)
    return values(engine)


def test_local_sgd_ends_at_the_mean_of_what_workers_learn_alone(server: OuterServer) -> None:
    def alone(index: int) -> torch.Tensor:
        engine = make_engine()
        for step in range(4):
            engine.train_step(random_batch(seed=10 * step + index), step=step)
        return values(engine)

    settings = {"inner_steps": 4, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    one, other = in_threads(lambda index: train(index, server=server, **settings), count=2)
    torch.testing.assert_close(one, (alone(0) + alone(1)) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_steps": 2},
        {"inner_steps": 4, "fragments": 2},
        {"inner_steps": 6, "fragments": 3},
        {"inner_steps": 2, "compression": "int8"},
        {"inner_steps": 4, "fragments": 2, "compression": "bfloat16"},
    ],
)
def test_workers_end_with_the_same_parameters(server: OuterServer, settings: dict[str, Any]) -> None:
    """Fragments in turn, what is left at the end, rounding: all have what the server has."""
    one, other = in_threads(lambda index: train(index, server=server, steps=9, **settings), count=2)
    assert torch.equal(one, other) and bool(one.isfinite().all())
    assert not torch.equal(one, values(make_engine()))
    assert server.state is not None and torch.equal(server.state.published.sort()[0], one.sort()[0])


def test_asynchronous_workers_learn_from_each_other(server: OuterServer) -> None:
    settings = {"inner_steps": 2, "mode": "asynchronous", "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    in_threads(lambda index: train(index, server=server, steps=6, **settings), count=2)
    assert server.state is not None and server.state.version == 6 and server.dropped == 0


def test_one_worker_without_momentum_trains_as_a_run_does(tmp_path: Path, server: OuterServer) -> None:
    """The whole trainer; figures of the exchanges are in its log. Adam would make much of rounding."""
    ends = []
    for name in ("plain", "worker"):
        params = run_params(tmp_path, max_steps=5, optimizer=SGD.Params(), learning_rate=0.1)
        params.train.eval_interval_steps = 0
        if name == "worker":
            params.train.local_sgd = LocalSGD.Params(
                workers=1, worker=0, address=server.address, inner_steps=2, outer_learning_rate=1.0, outer_momentum=0.0
            )
        trainer = Trainer(params, run_dir=tmp_path / name)
        assert trainer.fit() == "finished"
        ends.append(values(trainer.engine))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    last = [record for record in read_metrics(tmp_path / "worker" / "metrics.jsonl") if "train/loss" in record][-1]
    assert last["local_sgd/exchanges"] == 3 and last["local_sgd/sent_bytes"] > 4 * ends[0].numel()
    deadline = time.monotonic() + 10
    while not server.done and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.done


def test_a_run_that_is_no_worker_of_those_planned_is_refused(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    params.train.local_sgd = LocalSGD.Params(workers=2)
    with pytest.raises(ParamsError, match=r"train\.local_sgd\.worker: must say which of the 2 workers"):
        Trainer(params, run_dir=tmp_path / "run").fit()


@pytest.mark.parametrize(
    ("path", "value", "off"), [("tensor", 2, 1), ("pipe", 2, 1), ("expert", 2, 1), ("zero.stage", 1, 0)]
)
def test_workers_with_parts_of_the_model_are_refused_by_the_params(
    path: str, value: int, off: int, tmp_path: Path
) -> None:
    params = run_params(tmp_path)
    params.set(f"parallel.{path}", value)
    assert params.check() == []
    params.train.local_sgd = LocalSGD.Params(workers=2)
    assert [str(problem) for problem in params.check()] == [
        f"parallel.{path}: must be off with train.local_sgd, but is {value}. Each rank of a worker has the whole "
        f"model: set parallel.{path}={off}, or train.local_sgd.workers=0."
    ]


def test_a_server_that_is_not_there_is_named() -> None:
    local = LocalSGD.Params(workers=1, worker=0, address="127.0.0.1:1", timeout_seconds=0.3)
    worker = Worker.of(local, engine=make_engine(), team=Team(Place()))
    assert worker is not None
    with pytest.raises(TrainingError, match=r"127\.0\.0\.1:1: must be where the outer server can be reached"):
        worker.join()


def test_a_server_that_goes_away_is_named(server: OuterServer) -> None:
    local = LocalSGD.Params(workers=1, worker=0, address=server.address, inner_steps=1)
    worker = Worker.of(local, engine=make_engine(), team=Team(Place()))
    assert worker is not None
    worker.join()
    server.close()
    with pytest.raises(TrainingError, match="must answer while the workers train, but is gone"):
        worker.after_step(last=False)


def _data_parallel_worker(rank: int, address: str) -> list[float]:
    parallel = Parallel.Params(data=2)
    mesh = Mesh(resolve_layout(parallel, world_size=2), rank=rank)
    engine = make_engine(mesh=mesh, parallel=parallel)
    local = LocalSGD.Params(workers=2, worker=1, address=address, inner_steps=2)
    worker = Worker.of(local, engine=engine, team=current_team())
    assert worker is not None
    worker.join()
    for step in range(3):
        engine.train_step(random_batch(seed=10 * step + rank), step=step)
        worker.after_step(last=step == 2)
    worker.leave(finished=True)
    return [float(value) for value in values(engine)]


def test_a_worker_may_be_a_data_parallel_group(server: OuterServer) -> None:
    def work(index: int) -> Any:
        if index == 0:
            return train(0, server=server, steps=3, inner_steps=2)
        return run_ranks(_data_parallel_worker, world_size=2, arguments=(server.address,))

    alone, ranks = in_threads(work, count=2)
    assert alone.tolist() == ranks[0] == ranks[1]


COMMAND = (
    "quickstart.Numbers", "train.max_steps=40", "train.log_interval_steps=1", "train.eval_interval_steps=0",
    "train.decode_at_end=false", "train.num_threads=1", "train_input.source.num_examples=2000",
    "train_input.batching.rows=4", "eval_inputs.held_out.source.num_examples=20", "task.model_dim=32",
    "task.encoder.num_layers=1", "task.decoder.num_layers=1", "checkpoint.interval_steps=5",
    "train.local_sgd.workers=2", "train.local_sgd.inner_steps=5",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_killed_worker_comes_back_and_the_others_go_on(tmp_path: Path, mode: str) -> None:
    """One command; kill -9 of a worker in the middle."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "megaseq", "train", *COMMAND, f"train.local_sgd.mode={mode}",
            f"train.cache_dir={tmp_path / 'cache'}", "--run-dir", str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    metrics = tmp_path / "run" / "worker-1" / "metrics.jsonl"
    while max((record["step"] for record in read_metrics(metrics)), default=0) < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "local_sgd.worker=1"], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert "worker 1 was ended by SIGKILL, starts again" in stderr
    assert "MiB to the server and back" in stdout
    for index in range(2):
        records = list(read_metrics(tmp_path / "run" / f"worker-{index}" / "metrics.jsonl"))
        losses = {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
        assert max(losses) == 40 and losses[40] < 0.8 * losses[1]
