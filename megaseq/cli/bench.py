"""`megaseq bench kernels`: proves the Triton kernels on this machine's GPU, times them, chooses their tile sizes."""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megaseq.base.errors import MegaseqError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    import torch

    from megaseq.kernels.bench_case import BenchCase


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parsers."""
    parser = subparsers.add_parser(
        "bench", help="prove and time the kernels on a GPU", description="Benchmarks.", allow_abbrev=False
    )
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    kernels = subjects.add_parser(
        "kernels",
        help="prove and time the Triton kernels",
        description="Proves each kernel against its reference, then times it beside its peers.",
        allow_abbrev=False,
    )
    kernels.add_argument("--ops", nargs="+", metavar="OP", help="only these ops")
    kernels.add_argument("--cases", metavar="TEXT", default="", help="only cases with TEXT in their names")
    kernels.add_argument("--check", action="store_true", help="prove only; without a GPU, under Triton's interpreter")
    kernels.add_argument(
        "--tune", action="store_true", help="choose tile sizes too, and write them into FOLDER and into the package"
    )
    kernels.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        default=math.inf,
        help="begin nothing after N minutes; exits with 3 then, and the same command again goes on",
    )
    kernels.add_argument("--fresh", action="store_true", help="begin anew: forget what FOLDER has of these ops")
    kernels.add_argument(
        "--out",
        metavar="FOLDER",
        default=".",
        help="where results are kept as JSON, after each case; a run goes on where the last one ended; default: here",
    )
    kernels.set_defaults(run=run_kernels)
    ledger = subjects.add_parser(
        "ledger",
        help="write into a page which kernels have run on which GPU",
        description="Writes the ledger and the results of the runs in FOLDER into PAGE, between its marks.",
        allow_abbrev=False,
    )
    ledger.add_argument("page", metavar="PAGE", help="docs/kernels.md")
    ledger.add_argument("--results", metavar="FOLDER", default="", help="default: kernel_results beside the page")
    ledger.set_defaults(run=run_ledger)


def gpu() -> torch.device | None:
    """The device that kernels run on, or None."""
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else None


def run_kernels(arguments: argparse.Namespace) -> int:
    """Runs `bench kernels`; returns the exit code."""
    import torch

    if not arguments.minutes >= 0:
        raise MegaseqError(
            f"bench kernels: --minutes must be at least 0, but is {arguments.minutes}. Leave it out to run to the end."
        )
    device = gpu()
    if device is None and not arguments.check:
        raise MegaseqError(
            "bench kernels: the machine must have a CUDA GPU, but has none. "
            "Run it on one, or prove the kernels without timing them: megaseq bench kernels --check."
        )
    # Read when a kernel is defined, so before the ops are imported.
    os.environ["TRITON_INTERPRET"] = "1" if device is None else "0"
    logging.getLogger("megaseq.kernels.bench").setLevel(logging.INFO)
    cases = _cases(arguments, on_gpu=device is not None)
    if device is None:
        return _check(cases, device=torch.device("cpu"))
    return _run(cases, device=device, arguments=arguments)


def run_ledger(arguments: argparse.Namespace) -> int:
    """Runs `bench ledger`; returns the exit code."""
    from megaseq.kernels.bench.ledger import write_ledger

    page = Path(arguments.page)
    write_ledger(page, folder=Path(arguments.results) if arguments.results else page.parent / "kernel_results")
    return 0


def _cases(arguments: argparse.Namespace, *, on_gpu: bool) -> dict[str, list[BenchCase]]:
    """By op, the most important first: on a GPU also what is only proven, in front of what is timed."""
    from megaseq.kernels.catalogue import bench_cases, proof_cases

    timed = bench_cases()
    proven = proof_cases() if on_gpu else {}
    unknown = sorted(set(arguments.ops or ()) - set(timed))
    if unknown:
        raise MegaseqError(
            f"bench kernels: --ops must name ops with benchmarks, but has {', '.join(unknown)}. "
            f"Choose from: {', '.join(timed)}."
        )
    chosen = [op for op in timed if op in (arguments.ops or timed)]
    by_op = {op: [*proven.get(op, ()), *timed[op]] for op in chosen}
    cases = {op: [case for case in found if arguments.cases in case.name] for op, found in by_op.items()}
    if not any(cases.values()):
        raise MegaseqError(
            f"bench kernels: --cases must be in the name of a case, but is {arguments.cases!r}. Leave it out."
        )
    return cases


def _check(cases: dict[str, list[BenchCase]], *, device: torch.device) -> int:
    from megaseq.kernels.bench.runner import prove_all

    every = [case for found in cases.values() for case in found]
    wrong = prove_all(every, device=device)
    print(f"{len(every)} cases proven under the interpreter, {len(wrong)} results wrong")
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


def _run(cases: dict[str, list[BenchCase]], *, device: torch.device, arguments: argparse.Namespace) -> int:
    """Proves, tunes and times; returns 0 if all is done and right, 1 if something is wrong, 3 if something is left."""
    from megaseq.kernels.bench.record import of_machine
    from megaseq.kernels.bench.results import to_markdown
    from megaseq.kernels.bench.runner import DeviceLost, Runner
    from megaseq.kernels.bench.tuner import written_to
    from megaseq.kernels.catalogue import source_hash

    deadline, folder = time.monotonic() + 60 * arguments.minutes, Path(arguments.out)
    record = of_machine(device, folder=folder)
    if arguments.fresh:
        record.forget(cases)
    runner = Runner(
        record,
        device=device,
        sources={op: source_hash(op) for op in cases},
        deadline=deadline,
        written=written_to(folder, machine=record.machine),
    )
    try:
        left = runner.run(cases, tune=arguments.tune and not arguments.check, timed=not arguments.check)
        rest = f"{left} steps are left: run the same command again to go on" if left else ""
    except DeviceLost as error:
        rest = f"{error}\nRun the same command again to go on without this case"
    print(to_markdown(record.machine, results=record.results(cases)), end="")
    wrong = runner.wrong(cases)
    print(f"{sum(len(record.ops[op].proven) for op in cases)} cases proven on the GPU, {len(wrong)} results wrong")
    print("\n".join([*wrong, *filter(None, [rest])]))
    print(f"kept in {record.path}")
    return 3 if rest else 1 if wrong else 0
