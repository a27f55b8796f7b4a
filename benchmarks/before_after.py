"""Training speed of this checkout of megaseq beside another one, say of last month: has anything become slower?

    python benchmarks/before_after.py --before ../before

Each checkout trains the model of `train_cpu.py` in a process of its own, on the same batches. The processes take single
steps in turn, so that a machine whose speed drifts is as fast for one as for the other; the ratios are of pairs of
steps. The other checkout needs an environment of its own, `.venv`: the compiled extension belongs to one version of the
package.
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

import train_cpu

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Starts both processes, has them take steps in turn, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        take_steps(arguments)
        return
    before = arguments.before.resolve()
    python = arguments.python or before / ".venv/bin/python"
    if not (before / "megaseq").is_dir() or not Path(python).is_file():
        sys.exit(
            f"--before must name a checkout of megaseq with a .venv, but is {before}. Install megaseq there first."
        )
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = Path(folder)
        train_cpu.prepare(arguments)
        sides = [_start(before, python=python, arguments=arguments)]
        sides.append(_start(HERE, python=sys.executable, arguments=arguments))
        try:
            for side in sides:
                _answer(side)
            pairs = []
            for number in range(arguments.steps):
                # Which goes first changes: what one leaves in the caches is the other's gain or loss.
                order = (0, 1) if number % 2 else (1, 0)
                found = {index: _step(sides[index]) for index in order}
                pairs.append((found[0], found[1]))
        finally:
            for side in sides:
                side.kill()
                side.wait()
    print_table(pairs)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--python", help="its interpreter; default: that of its .venv")
    parser.add_argument("--data-dir", type=Path, help="folder with train.de.gz and train.en.gz")
    parser.add_argument("--tokens", type=int, default=4096, help="target tokens a step, about")
    parser.add_argument("--steps", type=int, default=60, help="of each side, after warm-up; at least 2")
    parser.add_argument("--precision", choices=train_cpu.PRECISIONS["megaseq"], default="fp32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: quartiles need two pairs.")
    return arguments


def take_steps(arguments: argparse.Namespace) -> None:
    """A side's process: one step for each line that it reads, answered by its seconds."""
    steps = train_cpu.megaseq_steps(arguments)
    for _ in range(train_cpu.WARM_UP_STEPS):
        next(steps)
    print("RESULT null", flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        next(steps)
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print("RESULT " + json.dumps(seconds), flush=True)


def _start(checkout: Path, *, python: str | Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Starts the process of one side, by this file with that side's package."""
    command = [str(python), __file__, "--child", "--before", str(arguments.before), "--work", str(arguments.work)]
    command += ["--tokens", str(arguments.tokens), "--precision", arguments.precision]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=arguments.work
    )


def _step(side: subprocess.Popen[str]) -> dict[str, float]:
    """Has a side take a step; returns its seconds."""
    assert side.stdin is not None
    print("step", file=side.stdin, flush=True)
    answer: dict[str, float] = _answer(side)
    return answer


def _answer(side: subprocess.Popen[str]) -> Any:
    """What a side says next."""
    assert side.stdout is not None
    for line in side.stdout:
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit("Both sides must run to the end, but one has stopped. Its own lines above say why.")


def print_table(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> None:
    """Prints medians and the ratios of pairs."""
    print(f"| a step, median of {len(pairs)} | before | now | now / before | quartiles |")
    print("|---|---|---|---|---|")
    for kind, name in (("wall", "wall time"), ("cpu", "CPU time")):
        before, now = (statistics.median(pair[side][kind] for pair in pairs) * 1e3 for side in (0, 1))
        ratios = [pair[1][kind] / pair[0][kind] for pair in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {before:.0f} ms | {now:.0f} ms | {middle:.3f} | {low:.3f}, {high:.3f} |")


if __name__ == "__main__":
    main()
