"""Proves cases, then times them: never a wrong one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from megaseq.kernels.bench.proof import forced, prove
from megaseq.kernels.bench.results import Result, result
from megaseq.kernels.bench.timing import Ceiling, Measured, measure
from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.checks import KernelError

logger = logging.getLogger(__name__)


def prove_all(cases: Iterable[BenchCase], *, device: torch.device) -> list[str]:
    """Proves every case; returns what is wrong, a sentence each. A case that fails to run is wrong."""
    wrong: list[str] = []
    for case in cases:
        try:
            found = prove(case, device=device)
        except Exception as error:  # A kernel fails in any way; the others are to be proven all the same.
            found = [f"{case.op}: {case.name} fails with {type(error).__name__}: {_first_line(error)}"]
        logger.info("%s %s: %s", case.op, case.name, "; ".join(found) if found else "right")
        wrong += found
    return wrong


def time_all(cases: Sequence[BenchCase], *, device: torch.device, best: Ceiling) -> list[Result]:
    """Proves all cases, then times each beside its peers.

    Raises:
        KernelError: if one of them is wrong; nothing was timed then.
    """
    wrong = prove_all(cases, device=device)
    if wrong:
        lines = "\n".join(wrong)
        raise KernelError(f"bench: kernels must compute what their references do, but\n{lines}\nNothing was timed.")
    return [time_case(case, device=device, best=best) for case in cases]


def time_case(case: BenchCase, *, device: torch.device, best: Ceiling) -> Result:
    """Times one case, and each of its peers that runs."""
    timed = case.prepare(device)
    with forced(case.op):
        own = measure(timed.run, device=device)
    peers = {name: _attempt(run, device=device) for name, run in timed.peers.items()}
    found = result(op=case.op, case=case.name, timed=timed, own=own, peers=peers, best=best)
    logger.info("%s %s: %.3g ms", case.op, case.name, own.seconds * 1e3)
    return found


def _attempt(run: Callable[[], object], *, device: torch.device) -> Measured | str:
    try:
        return measure(run, device=device)
    except Exception as error:  # Whatever a peer fails with, out of memory first of all.
        return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
