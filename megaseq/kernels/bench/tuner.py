"""Chooses tile sizes on the card at hand, and writes the table that `triton_runtime` reads."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench.proof import forced, prove
from megaseq.kernels.bench.timing import Measured, measure
from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.triton_runtime import Config

logger = logging.getLogger(__name__)

Table = dict[str, dict[str, Config]]
"""By kernel and key: the best tile sizes."""
Measure = Callable[..., Measured]


def tune(cases: Iterable[BenchCase], *, device: torch.device, measured: Measure = measure) -> Table:
    """Tries the candidates of each case, a kernel after the other, with the best of the kernels before.

    The fastest that is right is taken. A key that several cases share gets what the first of them chose: list the
    most important shape first.
    """
    table: Table = {}
    for case in cases:
        if case.candidates:
            run = case.prepare(device).run
            with forced(case.op):
                _tune_case(case, run=run, table=table, device=device, measured=measured)
    return table


def _tune_case(
    case: BenchCase, *, run: Callable[[], object], table: Table, device: torch.device, measured: Measure
) -> None:
    keys = _keys(run)
    chosen: dict[str, Config] = {}
    for kernel, candidates in case.candidates.items():
        asked = keys.get(kernel, [])
        rows = table.setdefault(kernel, {})
        known = [rows[key] for key in asked if key in rows]
        if known:
            chosen[kernel] = known[0]
            continue
        seconds = {
            index: _seconds(run, configs={**chosen, kernel: candidate}, device=device, measured=measured)
            for index, candidate in enumerate(candidates)
        }
        for index in sorted((i for i in seconds if math.isfinite(seconds[i])), key=seconds.__getitem__):
            with triton_runtime.override(**chosen, **{kernel: candidates[index]}):
                wrong = prove(case, device=device)
            if not wrong:
                chosen[kernel] = candidates[index]
                break
            logger.warning("%s: %s is wrong with %s: %s", case.op, kernel, candidates[index], "; ".join(wrong))
        rows.update({key: chosen[kernel] for key in asked if kernel in chosen})
    logger.info("%s %s: %s", case.op, case.name, chosen)


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


def write_table(table: Table, *, architecture: int, card: str, versions: Mapping[str, str]) -> Path:
    """Writes the table of an architecture, keeping the entries of kernels and keys that `table` does not have."""
    path = triton_runtime.TABLES / f"sm_{architecture}.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    for kernel, rows in table.items():
        kernels.setdefault(kernel, {}).update({key: dataclasses.asdict(found) for key, found in rows.items()})
    content = {
        "card": card,
        "versions": dict(versions),
        "kernels": {kernel: dict(sorted(rows.items())) for kernel, rows in sorted(kernels.items())},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    triton_runtime.forget_tables()
    return path


def _keys(run: Callable[[], object]) -> dict[str, list[str]]:
    """By kernel: the keys under which a run asks for its tile sizes."""
    with triton_runtime.observed() as asked:
        run()
    found: dict[str, list[str]] = {}
    for kernel, key in sorted(asked):
        found.setdefault(kernel, []).append(key)
    return found
