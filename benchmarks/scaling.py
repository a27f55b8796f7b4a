"""Layouts on this machine: tokens a second, bytes sent by axis, exposed communication; and what the engine costs.

    python benchmarks/scaling.py                         # about 5 minutes on 2 cores
    python benchmarks/scaling.py --layouts data=2 tensor=2 --cpu-time

Every layout trains the same model on the same batches with as many gloo processes as it needs; on few cores that shows
what is sent and waited for, not a speed-up. Columns: tokens of all ranks a second; milliseconds of a step; of these,
those in which a rank did nothing but wait for others (mean of the ranks), and their share; megabytes that a rank gives
to collectives in a step, by axis. `data=2` sums gradients during the backward pass, `data=2, at the end` after it.

Then two processes train the same model with our engine, with DistributedDataParallel and torch's fused AdamW, and with
DeepSpeed's engine at ZeRO stage 1, in turn, a few steps each. The overhead of a round is the ratio of its mean steps;
printed are the median of the rounds, and their quartiles. `--cpu-time` compares processor time instead of time, which
others on the machine hardly change and in which waiting is free. Start-up is from starting two processes to the end of
their first step.
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
    "data=2, at the end": (2, {"data": 2, "zero.overlap": False}),
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
PAIRS = (("megaseq", "ddp"), ("megaseq zero1", "deepspeed zero1"))
"""Ours, and what it is compared with."""
TIMEOUT_SECONDS = 600
ROWS, LENGTH, VOCAB = 16, 64, 4000
AXES = ("data", "tensor", "pipe", "context")
START = "MEGASEQ_BENCHMARK_START"


def main() -> None:
    """Runs the children one after the other, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        result = measure_sides(arguments) if arguments.child == "sides" else measure_layout(arguments)
        print("RESULT " + json.dumps(result), flush=True)
        leave()
        return
    begun = time.monotonic()
    names = arguments.layouts or list(LAYOUTS)
    clock = "CPU" if arguments.cpu_time else "wall"
    print(f"{len(os.sched_getaffinity(0))} cores, {ROWS * 2 * LENGTH} tokens a step, steps in {clock} time")
    heads = ("tokens/s".rjust(10), "step".rjust(10), "waiting".rjust(10), "exposed".rjust(10))
    print("layout".ljust(27), *heads, "  MB a step and rank", sep="", flush=True)
    start = 0.0
    for number, name in enumerate(names):
        progress(f"{number + 1}/{len(names) + 1}: {name}", begun=begun)
        ranks = spawn(name, processes=LAYOUTS[name][0], arguments=arguments)
        if name == "data=2":
            start = max(rank["start"] for rank in ranks)
        print_layout(name, ranks, cpu_time=arguments.cpu_time)
    progress(f"{len(names) + 1}/{len(names) + 1}: beside DDP and DeepSpeed, {arguments.rounds} rounds", begun=begun)
    print_sides(spawn("sides", processes=2, arguments=arguments)[0], cpu_time=arguments.cpu_time)
    if not start:
        start = max(rank["start"] for rank in spawn("data=2", processes=2, arguments=arguments))
    print(f"start-up of 2 processes    {start:9.1f} s")
    print(f"measured in                {(time.monotonic() - begun) / 60:9.1f} min")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a layout, and of a side in a round")
    parser.add_argument("--rounds", type=int, default=10, help="of the sides in turn")
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), metavar="NAME", help=f"of {list(LAYOUTS)}")
    parser.add_argument("--cpu-time", action="store_true", help="compare processor time")
    parser.add_argument("--child", choices=["sides", *LAYOUTS], help=argparse.SUPPRESS)
    return parser.parse_args()


def progress(text: str, *, begun: float) -> None:
    """Says on stderr what is being measured."""
    print(f"[{time.monotonic() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)


def spawn(name: str, *, processes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a child on so many processes and returns what each rank measured."""
    command = [sys.executable, __file__, "--child", name, "--steps", str(arguments.steps)]
    command += ["--rounds", str(arguments.rounds), "--model-dim", str(arguments.model_dim)]
    command += ["--num-layers", str(arguments.num_layers)] + ["--cpu-time"] * arguments.cpu_time
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
    try:
        outputs = [child.communicate(timeout=TIMEOUT_SECONDS) for child in children]
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name}: a rank did not end in {TIMEOUT_SECONDS} s") from None
    finally:
        for child in children:
            child.kill()
    for rank, (child, (_, errors)) in enumerate(zip(children, outputs, strict=True)):
        if child.returncode:
            raise SystemExit(f"{name}: rank {rank} ended with {child.returncode}\n{errors[-3000:]}")
    lines = [next(line for line in text.splitlines() if line.startswith("RESULT ")) for text, _ in outputs]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def print_layout(name: str, ranks: list[dict[str, Any]], *, cpu_time: bool) -> None:
    """Prints a row of the table: the slowest rank's step, and means of the ranks for what they wait and send."""
    step = max(rank["cpu" if cpu_time else "step"] for rank in ranks)
    waiting = statistics.mean(rank["waiting"] for rank in ranks)
    exposed = statistics.mean(rank["waiting"] / rank["step"] for rank in ranks)
    axes = dict.fromkeys(axis for rank in ranks for axis in rank["sent"])
    sent = {axis: statistics.mean(rank["sent"].get(axis, 0.0) for rank in ranks) for axis in axes}
    text = ", ".join(f"{axis} {size / 1e6:.1f}" for axis, size in sent.items()) or "nothing"
    times = f"{ROWS * 2 * LENGTH / step:10.0f}{1e3 * step:7.0f} ms{1e3 * waiting:7.0f} ms{exposed:10.0%}"
    print(f"{name:27}{times}  {text}", flush=True)


def print_sides(sides: dict[str, Any], *, cpu_time: bool) -> None:
    """Prints the steps of all sides and what our engine costs over the others."""
    print(f"\n2 processes, {'CPU' if cpu_time else 'wall'} time of a step, {sides['rounds']} rounds in turn")
    for side in SIDES:
        print(f"{side:27}{1e3 * sides['step'][side]:9.1f} ms")
    for ours, theirs in PAIRS:
        low, median, high = sides["over"][theirs]
        print(f"{f'{ours} over {theirs}':33}{median:+6.1%}  (half of the rounds {low:+.1%} to {high:+.1%})")


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
    """Trains on one layout; returns of a step the seconds, what is sent and how long is waited, and the start-up."""
    traffic = Traffic()
    with traffic.counted():
        engine = make_engine(arguments, parallel=LAYOUTS[arguments.child][1])
        batch = make_batch(engine.mesh)
        engine.train_step(batch, step=0)
        start = time.time() - float(os.environ[START])
        engine.train_step(batch, step=1)
        traffic.begin(engine.mesh)
        before = time.perf_counter(), time.process_time()
        for step in range(arguments.steps):
            engine.train_step(batch, step=2 + step)
        after = time.perf_counter(), time.process_time()
    return {
        "step": (after[0] - before[0]) / arguments.steps,
        "cpu": (after[1] - before[1]) / arguments.steps,
        "sent": {axis: size / arguments.steps for axis, size in traffic.sent.items()},
        "waiting": traffic.waited / arguments.steps,
        "start": start,
    }


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
    """Trains with all sides in turn; returns the median of a step's seconds, and quartiles of the overheads."""
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
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(arguments.rounds + 1):
        # Who comes after whom changes, as what one leaves in the caches is the next one's cost.
        for side in SIDES if number % 2 else reversed(SIDES):
            dist.barrier()
            before = clock()
            for _ in range(arguments.steps):
                steps[side](batch, number)
            if number:  # the first round warms up
                seconds[side].append((clock() - before) / arguments.steps)
    over = {
        theirs: quartiles([a / b - 1 for a, b in zip(seconds[ours_], seconds[theirs], strict=True)])
        for ours_, theirs in PAIRS
    }
    median = {side: statistics.median(seconds[side]) for side in SIDES}
    return {"step": median, "over": over, "rounds": arguments.rounds}


def quartiles(values: list[float]) -> list[float]:
    """Returns the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def leave() -> None:
    """Leaves together: a rank that goes first breaks the others' connections."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
