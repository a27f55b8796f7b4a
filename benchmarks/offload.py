"""Where shares of masters and moments lie: time of a step and memory of a process, ZeRO stage 1.

    python benchmarks/offload.py                         # about a minute on 2 cores
    python benchmarks/offload.py --nvme-path /mnt/disk --vocab-size 200000

Each row is a process of its own with the same model and batches: most of the parameters are embeddings, so that updates
are most of a step. Columns: the fastest and the median step; the most that was in memory during the steps, files that
are mapped among it, above what the process had before it built the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLACES = ("none", "cpu", "nvme")


def main() -> None:
    """Runs a child for each place, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        print("RESULT " + json.dumps(measure(arguments)), flush=True)
        return
    print("masters and moments     step, fastest    step, median    memory", flush=True)
    for place in PLACES:
        result = spawn(place)
        print(
            f"{place:<24}{result['fastest'] * 1000:10.0f} ms{result['median'] * 1000:13.0f} ms"
            f"{result['memory'] / 2**20:8.0f} MiB   {result['elements'] / 1e6:.1f} M parameters",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not")
    parser.add_argument("--vocab-size", type=int, default=100_000)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--nvme-path", default=tempfile.gettempdir(), help="directory on the disk")
    parser.add_argument("--child", choices=PLACES, help=argparse.SUPPRESS)
    return parser.parse_args()


def spawn(place: str) -> dict[str, float]:
    """Measures one place in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", place]
    environment = {"DS_ACCELERATOR": "cpu", **os.environ}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return result


def in_memory(name: str) -> int:
    """Returns the bytes that `/proc/self/status` has under `name`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains a few steps and returns seconds, bytes and elements."""
    import torch

    from megaseq.base import NestedMap
    from megaseq.layers.families import stacks
    from megaseq.learner import AdamW, Constant, Learner
    from megaseq.parallel.layout import Parallel
    from megaseq.tasks.translation import Translation
    from megaseq.train.engine import Engine
    from megaseq.train.updaters.deepspeed_package import load_deepspeed

    load_deepspeed(torch.device("cpu"))
    before = in_memory("VmRSS")
    sizes: dict[str, Any] = {"source_vocab_size": arguments.vocab_size, "target_vocab_size": arguments.vocab_size}
    stack = stacks(num_layers=1, num_heads=8, hidden_dim=2 * arguments.model_dim)
    parallel = Parallel.Params()
    for path, value in {"stage": 1, "offload_optimizer": arguments.child, "nvme_path": arguments.nvme_path}.items():
        parallel.set(f"zero.{path}", value, origin="the benchmark")
    parallel.zero.bucket_elements = 1 << 20
    engine = Engine(
        Translation.Params(model_dim=arguments.model_dim, **sizes, **stack),
        learner_params=Learner.Params(learning_rate=1e-3, schedule=Constant.Params(), optimizer=AdamW.Params()),
        seed=1,
        precision="fp32",
        parallel=parallel,
    )
    ids = torch.randint(4, arguments.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = NestedMap(source=NestedMap(ids=ids), target=NestedMap(ids=ids, labels=ids, weights=torch.ones(ids.shape)))
    seconds = []
    for step in range(arguments.steps + 2):
        if step == 2:
            # The most that has been in memory is counted from here.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        begun = time.perf_counter()
        engine.train_step(batch, step=step)
        seconds.append(time.perf_counter() - begun)
    return {
        "fastest": min(seconds[2:]),
        "median": statistics.median(seconds[2:]),
        "memory": in_memory("VmHWM") - before,
        "elements": engine.num_parameters,
    }


if __name__ == "__main__":
    main()
