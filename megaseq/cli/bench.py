"""`megaseq bench kernels`: proves the Triton kernels on this machine's GPU, times them, chooses their tile sizes."""

from __future__ import annotations

import argparse
import logging
import os
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
    kernels.add_argument("--tune", action="store_true", help="choose tile sizes first, and write them into the package")
    kernels.add_argument("--out", metavar="FOLDER", default=".", help="where results go as JSON; default: here")
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

    device = gpu()
    if device is None and not arguments.check:
        raise MegaseqError(
            "bench kernels: the machine must have a CUDA GPU, but has none. "
            "Run it on one, or prove the kernels without timing them: megaseq bench kernels --check."
        )
    # Read when a kernel is defined, so before the ops are imported.
    os.environ["TRITON_INTERPRET"] = "1" if device is None else "0"
    logging.getLogger("megaseq.kernels.bench").setLevel(logging.INFO)
    cases = _cases(arguments)
    if arguments.check or device is None:
        return _check(cases, device=device or torch.device("cpu"))
    return _time(cases, device=device, tune_first=arguments.tune, out=Path(arguments.out))


def run_ledger(arguments: argparse.Namespace) -> int:
    """Runs `bench ledger`; returns the exit code."""
    from megaseq.kernels.bench.ledger import write_ledger

    page = Path(arguments.page)
    write_ledger(page, folder=Path(arguments.results) if arguments.results else page.parent / "kernel_results")
    return 0


def _cases(arguments: argparse.Namespace) -> list[BenchCase]:
    from megaseq.kernels.catalogue import bench_cases

    by_op = bench_cases()
    unknown = sorted(set(arguments.ops or ()) - set(by_op))
    if unknown:
        raise MegaseqError(
            f"bench kernels: --ops must name ops with benchmarks, but has {', '.join(unknown)}. "
            f"Choose from: {', '.join(by_op)}."
        )
    chosen = arguments.ops or list(by_op)
    cases = [case for op in chosen for case in by_op[op] if arguments.cases in case.name]
    if not cases:
        raise MegaseqError(
            f"bench kernels: --cases must be in the name of a case, but is {arguments.cases!r}. Leave it out."
        )
    return cases


def _check(cases: list[BenchCase], *, device: torch.device) -> int:
    from megaseq.kernels.bench.runner import prove_all

    wrong = prove_all(cases, device=device)
    where = "on the GPU" if device.type == "cuda" else "under the interpreter"
    print(f"{len(cases)} cases proven {where}, {len(wrong)} results wrong")
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


def _time(cases: list[BenchCase], *, device: torch.device, tune_first: bool, out: Path) -> int:
    from megaseq.kernels.bench import results, timing, tuner
    from megaseq.kernels.bench.runner import time_all
    from megaseq.kernels.catalogue import source_hash

    best = timing.ceiling(device)
    where = results.machine(device, ceiling=best)
    if tune_first:
        table = tuner.tune(cases, device=device)
        path = tuner.write_table(table, architecture=where.architecture, card=where.card, versions=where.versions)
        print(f"tile sizes of {len(table)} kernels: {path}")
    found = time_all(cases, device=device, best=best)
    hashes = {op: source_hash(op) for op in {case.op for case in cases}}
    name = f"{where.card.lower().replace(' ', '_').replace('/', '_')}.json"
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(results.to_json(where, results=found, hashes=hashes), encoding="utf-8")
    print(results.to_markdown(where, results=found), end="")
    return 0
