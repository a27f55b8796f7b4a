"""Chooses tile sizes on the card at hand, and writes the table that `triton_runtime` reads."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench.launches import compile_all, recorded
from megaseq.kernels.bench.proof import forced, prove
from megaseq.kernels.bench.record import Table
from megaseq.kernels.bench.results import Machine
from megaseq.kernels.bench.timing import Measured, measure
from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.triton_runtime import Config

logger = logging.getLogger(__name__)

SECONDS = 0.15
"""How long a candidate is timed."""
Measure = Callable[..., Measured]
Keep = Callable[[str, Mapping[str, Config]], object]
"""Called with a kernel and what was chosen for it, by key, as soon as that is known."""


def quickly(run: Callable[[], object], *, device: torch.device) -> Measured:
    """The clock for candidates."""
    return measure(run, device=device, seconds=SECONDS)


def tune_case(
    case: BenchCase,
    *,
    table: Table,
    device: torch.device,
    keep: Keep,
    measured: Measure = quickly,
) -> list[str]:
    """Tries the candidates of a case, a kernel after the other, with the best of the kernels before.

    The fastest that is right is taken. A key that `table` has is left as it is: list the most important shape first.

    Args:
        case: one with candidates.
        table: what is known already.
        device: where the kernels run.
        keep: is told what is chosen.
        measured: the clock.

    Returns:
        What is wrong with the kernels as they are, a sentence each; nothing was tried then.

    Raises:
        ValueError: if the case has nothing to be timed.
    """
    if case.prepare is None:
        raise ValueError(f"{case.name} is only proven")
    run = case.prepare(device).run
    with forced(case.op):
        keys = _keys(run)
        tried = {kernel: found for kernel, found in case.candidates.items() if kernel in keys and len(found) > 1}
        if all(key in table.get(kernel, {}) for kernel in tried for key in keys[kernel]):
            return []
        wrong = prove(case, device=device)
        if wrong:
            return wrong
        chosen: dict[str, Config] = {}
        for kernel in tried:
            known = table.get(kernel, {})
            new = [key for key in keys[kernel] if key not in known]
            if not new:
                chosen[kernel] = known[keys[kernel][0]]
                continue
            best = _best(case, run=run, kernel=kernel, chosen=chosen, device=device, measured=measured)
            if best is not None:
                chosen[kernel] = best
                keep(kernel, dict.fromkeys(new, best))
    logger.info("%s %s: %s", case.op, case.name, chosen)
    return []


def _best(
    case: BenchCase,
    *,
    run: Callable[[], object],
    kernel: str,
    chosen: Mapping[str, Config],
    device: torch.device,
    measured: Measure,
) -> Config | None:
    """The fastest candidate of a kernel that is right; None if there is none."""
    candidates = case.candidates[kernel]
    variants = [{**chosen, kernel: candidate} for candidate in candidates]
    if device.type == "cuda":
        _compile(run, variants=variants)
    seconds = [_seconds(run, configs=configs, device=device, measured=measured) for configs in variants]
    for index in sorted(range(len(candidates)), key=seconds.__getitem__):
        if not math.isfinite(seconds[index]):
            break
        with triton_runtime.override(**variants[index]):
            wrong = prove(case, device=device)
        if not wrong:
            return candidates[index]
        logger.warning("%s: %s is wrong with %s: %s", case.op, kernel, candidates[index], "; ".join(wrong))
    return None


def _compile(run: Callable[[], object], *, variants: Sequence[Mapping[str, Config]]) -> None:
    """Compiles what a run launches with each of these tile sizes, many at a time."""
    launches = []
    for configs in variants:
        with triton_runtime.override(**configs), recorded() as found:
            run()
        launches += found
    compile_all(launches)


def _seconds(
    run: Callable[[], object], *, configs: Mapping[str, Config], device: torch.device, measured: Measure
) -> float:
    """Seconds of a run with these tile sizes; infinite where they do not fit the card."""
    with triton_runtime.override(**configs):
        try:
            return measured(run, device=device).seconds
        except Exception as error:  # Out of shared memory, registers, or what the compiler can do.
            logger.info("%s does not run: %s: %s", configs, type(error).__name__, error)
            return math.inf


def write_table(
    table: Mapping[str, Mapping[str, Config]],
    *,
    folder: Path,
    architecture: int,
    card: str,
    versions: Mapping[str, str],
) -> Path:
    """Writes the table of an architecture, keeping the entries of kernels and keys that `table` does not have."""
    path = folder / f"sm_{architecture}.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    for kernel, rows in table.items():
        kernels.setdefault(kernel, {}).update({key: dataclasses.asdict(found) for key, found in rows.items()})
    content = {
        "card": card,
        "versions": dict(versions),
        "kernels": {kernel: dict(sorted(rows.items())) for kernel, rows in sorted(kernels.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def written_to(folder: Path, *, machine: Machine) -> Callable[[Mapping[str, Mapping[str, Config]]], None]:
    """What writes chosen tile sizes into `folder`, and into the package if that can be written to."""

    def write(table: Mapping[str, Mapping[str, Config]]) -> None:
        for place in (folder, triton_runtime.TABLES):
            try:
                write_table(
                    table,
                    folder=place,
                    architecture=machine.architecture,
                    card=machine.card,
                    versions=machine.versions,
                )
            except OSError as error:
                if place is folder:
                    raise
                logger.warning("%s: tile sizes are not written: %s", place, error)

    return write


def _keys(run: Callable[[], object]) -> dict[str, list[str]]:
    """By kernel: the keys under which a run asks for its tile sizes. Nothing is launched, so nothing is compiled."""
    with triton_runtime.observed() as asked, recorded():
        run()
    found: dict[str, list[str]] = {}
    for kernel, key in sorted(asked):
        found.setdefault(kernel, []).append(key)
    return found
