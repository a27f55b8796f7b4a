"""Layouts on this machine: tokens a second, bytes sent by axis, exposed communication; and what the engine costs.

    python benchmarks/scaling.py

Every layout trains the same model on the same batches with as many gloo processes as it needs; on few cores that shows
what is sent and waited for, not a speed-up. Exposed is the time in which a rank did nothing but wait for a collective.
Then two processes train the same model with our engine, with DistributedDataParallel and torch's fused AdamW, and with
DeepSpeed's engine, in turn, a few steps each; the medians of CPU time a step are compared. Start-up is from starting
the processes to the end of the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "data=2": (2, {"data": 2}),
    "data=2, ZeRO 1": (2, {"data": 2, "zero.stage": 1}),
    "data=2, ZeRO 2": (2, {"data": 2, "zero.stage": 2}),
    "data=2, ZeRO 3": (2, {"data": 2, "zero.stage": 3}),
    "tensor=2": (2, {"tensor": 2}),
    "tensor=2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipe=2, 1f1b": (2, {"pipe": 2, "pipeline.micro_batches": 4}),
    "pipe=2, interleaved": (2, {"pipe": 2, "pipeline.schedule": "interleaved", "pipeline.micro_batches": 4}),
    "pipe=2, zero-bubble": (2, {"pipe": 2, "pipeline.schedule": "zero_bubble_v", "pipeline.micro_batches": 4}),
    "context=2, ring": (2, {"context": 2}),
    "context=2, ulysses": (2, {"context": 2, "context_method": "ulysses"}),
    "data=2 x tensor=2, ZeRO 1": (4, {"data": 2, "tensor": 2, "zero.stage": 1}),
}
SIDES = ("megaseq", "ddp", "megaseq zero1", "deepspeed zero1")
ROWS, LENGTH, VOCAB = 16, 64, 4000
AXES = ("data", "tensor", "pipe", "context")
START = "MEGASEQ_BENCHMARK_START"


def main() -> None:
    """Runs the children one after the other, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        result = measure_sides(arguments) if arguments.child == "sides" else measure_layout(arguments)
        if int(os.environ["RANK"]) == 0:
            print("RESULT " + json.dumps(result), flush=True)
        leave()
        return
    heading = (
        "layout".ljust(28) + "tokens/s".rjust(10) + "step".rjust(10) + "exposed".rjust(10) + "  sent a step by axis"
    )
    print(heading, flush=True)
    for name in arguments.layouts or LAYOUTS:
        print_layout(name, spawn(name, processes=LAYOUTS[name][0], arguments=arguments))
    sides = spawn("sides", processes=2, arguments=arguments)
    print("\n2 processes, CPU time of a step, medians of rounds in turn")
    for side in SIDES:
        print(f"{side:28}{1e3 * sides['cpu'][side]:9.1f} ms   wall {1e3 * sides['wall'][side]:.1f} ms")
    print(f"engine over DDP            {sides['over_ddp']:+10.1%}")
    print(f"engine over DeepSpeed      {sides['over_deepspeed']:+10.1%}")
    start = spawn("data=2", processes=2, arguments=arguments)["start"]
    print(f"start-up, 2 processes      {start:9.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a layout, and of a side in a round")
    parser.add_argument("--rounds", type=int, default=8, help="of the sides in turn")
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="default: all")
    parser.add_argument("--child", choices=["sides", *LAYOUTS], help=argparse.SUPPRESS)
    return parser.parse_args()


def spawn(name: str, *, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a child on so many processes and returns what its first rank measured."""
    command = [sys.executable, __file__, "--child", name, "--steps", str(arguments.steps)]
    command += ["--rounds", str(arguments.rounds), "--model-dim", str(arguments.model_dim)]
    command += ["--num-layers", str(arguments.num_layers)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        START: str(time.time()),
    }
    children = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [child.communicate() for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        if child.returncode:
            raise SystemExit(f"{name}: a rank ended with {child.returncode}\n{errors[-3000:]}")
    line = next(line for line in outputs[0][0].splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def print_layout(name: str, result: dict[str, Any]) -> None:
    """Prints a row of the table."""
    sent = ", ".join(f"{axis} {size / 1e6:.1f} MB" for axis, size in result["sent"].items()) or "nothing"
    speed, step = ROWS * 2 * LENGTH / result["step"], 1e3 * result["step"]
    print(f"{name:28}{speed:10.0f}{step:7.0f} ms{result['exposed']:10.0%}  {sent}", flush=True)


# ---- in the children ----


def make_parts(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Params of the model and of its learner."""
    from megaseq.layers.families import stacks
    from megaseq.layers.positions import SinusoidalPositions
    from megaseq.learner import AdamW, Constant, Learner
    from megaseq.tasks.translation import Translation

    dim = arguments.model_dim
    sides = stacks(
        num_layers=arguments.num_layers, num_heads=4, hidden_dim=4 * dim, positions=SinusoidalPositions.Params()
    )
    task = Translation.Params(model_dim=dim, source_vocab_size=VOCAB, target_vocab_size=VOCAB, **sides)
    learner = Learner.Params(learning_rate=1e-3, schedule=Constant.Params(), optimizer=AdamW.Params(), clip_norm=1.0)
    return task, learner


def make_mesh(parallel: dict[str, Any]) -> tuple[Any, Any]:
    """Joins the ranks; returns the mesh, None for one process, and the params of the layout."""
    import torch.distributed as dist

    from megaseq.parallel.layout import Parallel, resolve_layout
    from megaseq.parallel.mesh import Mesh

    params = Parallel.Params()
    for path, value in parallel.items():
        params.set(path, value)
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return None, params
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Mesh(resolve_layout(params, world_size=world_size), rank=dist.get_rank()), params


def make_engine(arguments: argparse.Namespace, *, parallel: dict[str, Any]) -> Any:
    """Our engine on a layout."""
    import torch

    from megaseq.train.engine import Engine

    torch.set_num_threads(1)
    mesh, params = make_mesh(parallel)
    task, learner = make_parts(arguments)
    return Engine(task, learner_params=learner, seed=1, precision="fp32", mesh=mesh, parallel=params)


def make_batch(mesh: Any, *, seed: int = 0) -> Any:
    """The rows of this rank of a batch without padding."""
    import torch

    from megaseq.base import NestedMap

    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, VOCAB, (ROWS, LENGTH), generator=draw) for _ in range(3)]
    segments = [torch.ones(ROWS, LENGTH, dtype=torch.long) for _ in range(2)]
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    target = NestedMap(ids=ids[1], labels=ids[2], weights=torch.ones(ROWS, LENGTH))
    target.segment_ids, target.positions = segments[1], positions
    source = NestedMap(ids=ids[0], segment_ids=segments[0], positions=positions.clone())
    batch = NestedMap(source=source, target=target)
    if mesh is None:
        return batch
    return batch.transform(lambda value: value[mesh.index("data") :: mesh.size("data")])


class Traffic:
    """Counts the bytes that collectives are given, by axis, and the time in which this rank waits for them."""

    NAMES = (
        "all_reduce",
        "all_to_all_single",
        "broadcast",
        "reduce",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    NAMES += ("all_gather_single", "reduce_scatter_single")

    def __init__(self) -> None:
        self.sent: dict[str, float] = defaultdict(float)
        self.waited = 0.0
        self._inside = False
        self._axes: dict[int, str] = {}

    def begin(self, mesh: Any) -> None:
        """Forgets what was counted so far, and learns which group is which axis."""
        self.sent.clear()
        self.waited = 0.0
        self._axes = {id(mesh.group(axis)): axis for axis in AXES if mesh is not None and mesh.size(axis) > 1}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts within the context; entered before the engine is made, as DeepSpeed keeps the functions it finds."""
        import torch.distributed as dist

        names = [name for name in self.NAMES if hasattr(dist, name)]
        plain = {name: getattr(dist, name) for name in (*names, "batch_isend_irecv")}
        for name in names:
            setattr(dist, name, self._wrapped(plain[name]))
        dist.batch_isend_irecv = self._batched(plain["batch_isend_irecv"])
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **options: Any) -> Any:
            import torch

            if self._inside:
                return function(*positional, **options)
            tensors = [value for value in (*positional, *options.values()) if isinstance(value, torch.Tensor)]
            size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            self.sent[self._axes.get(id(options.get("group")), "data")] += size
            return self._timed(function, *positional, **options)

        return call

    def _batched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(operations: list[Any]) -> Any:
            import torch.distributed as dist

            for operation in operations:
                if operation.op is dist.isend:
                    axis = self._axes.get(id(operation.group), "pipe")
                    self.sent[axis] += operation.tensor.numel() * operation.tensor.element_size()
            return [Waited(work, traffic=self) for work in function(operations)]

        return call

    def _timed(self, function: Callable[..., Any], *positional: Any, **options: Any) -> Any:
        before = time.perf_counter()
        self._inside = True
        try:
            work = function(*positional, **options)
        finally:
            self._inside = False
        self.waited += time.perf_counter() - before
        return work if work is None else Waited(work, traffic=self)


class Waited:
    """A collective that is on its way; its `wait` is timed."""

    def __init__(self, work: Any, *, traffic: Traffic) -> None:
        self._work, self._traffic = work, traffic

    def wait(self, *arguments: Any) -> Any:
        """Waits."""
        before = time.perf_counter()
        done = self._work.wait(*arguments)
        self._traffic.waited += time.perf_counter() - before
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def measure_layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains on one layout; returns the seconds of a step, what is sent, and which share of the time is waiting."""
    traffic = Traffic()
    with traffic.counted():
        engine = make_engine(arguments, parallel=LAYOUTS[arguments.child][1])
        batch = make_batch(engine.mesh)
        engine.train_step(batch, step=0)
        start = time.time() - float(os.environ[START])
        engine.train_step(batch, step=1)
        traffic.begin(engine.mesh)
        before = time.perf_counter()
        for step in range(arguments.steps):
            engine.train_step(batch, step=2 + step)
        seconds = time.perf_counter() - before
    sent = {axis: size / arguments.steps for axis, size in traffic.sent.items()}
    return {"step": seconds / arguments.steps, "sent": sent, "exposed": traffic.waited / seconds, "start": start}


def make_ddp(arguments: argparse.Namespace) -> Callable[[Any, int], None]:
    """A step of torch's own: DistributedDataParallel, clipping, fused AdamW."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    module = make_module(arguments)
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0, fused=True)

    def step(batch: Any, number: int) -> None:
        module.task.context.step = number
        loss = wrapped(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def make_deepspeed(arguments: argparse.Namespace) -> Callable[[Any, int], None]:
    """A step of DeepSpeed's own at ZeRO stage 1."""
    import torch

    from megaseq.train.updaters.deepspeed_package import load_deepspeed

    deepspeed = load_deepspeed(torch.device("cpu"))
    module = make_module(arguments)
    settings = {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-9, "weight_decay": 0.0, "torch_adam": True, "fused": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": settings},
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)

    def step(batch: Any, number: int) -> None:
        module.task.context.step = number
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


def make_module(arguments: argparse.Namespace) -> Any:
    """The task as a module whose forward pass is its loss."""
    import torch

    from megaseq.train.model import build_task

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = build_task(make_parts(arguments)[0], seed=1, device=torch.device("cpu")).task

        def forward(self, batch: Any) -> torch.Tensor:
            output = self.task.compute_loss(batch)
            return output.loss_sum / output.weight

    return Whole().train()


def measure_sides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains with all sides in turn; returns the medians of CPU and wall seconds of a step, and the overheads."""
    import torch.distributed as dist

    ours = make_engine(arguments, parallel={"data": 2})
    shares = make_engine(arguments, parallel={"data": 2, "zero.stage": 1})
    steps: dict[str, Callable[[Any, int], Any]] = {
        "megaseq": lambda batch, number: ours.train_step(batch, step=number),
        "ddp": make_ddp(arguments),
        "megaseq zero1": lambda batch, number: shares.train_step(batch, step=number),
        "deepspeed zero1": make_deepspeed(arguments),
    }
    batch = make_batch(ours.mesh)
    cpu: dict[str, list[float]] = defaultdict(list)
    wall: dict[str, list[float]] = defaultdict(list)
    for number in range(arguments.rounds + 1):
        for side in SIDES:
            dist.barrier()
            for _ in range(arguments.steps):
                times = time.process_time(), time.perf_counter()
                steps[side](batch, number)
                if number:  # the first round warms up
                    cpu[side].append(time.process_time() - times[0])
                    wall[side].append(time.perf_counter() - times[1])
    median = {side: statistics.median(cpu[side]) for side in SIDES}
    return {
        "cpu": median,
        "wall": {side: statistics.median(wall[side]) for side in SIDES},
        "over_ddp": median["megaseq"] / median["ddp"] - 1,
        "over_deepspeed": median["megaseq zero1"] / median["deepspeed zero1"] - 1,
    }


def leave() -> None:
    """Leaves together: a rank that goes first breaks the others' connections."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
