"""Proves cases, chooses tile sizes and times cases: never a wrong one, one after the other, and each on its own."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench import tuner
from megaseq.kernels.bench.launches import Launch, compile_all, launched, recorded
from megaseq.kernels.bench.proof import forced, prove
from megaseq.kernels.bench.record import OpRecord, Record
from megaseq.kernels.bench.results import Result, result
from megaseq.kernels.bench.timing import Ceiling, Measured, measure
from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.triton_runtime import Config

logger = logging.getLogger(__name__)

COMPILED_AT_ONCE = 24
"""Cases whose kernels are compiled together before the first of them is proven."""
MOST_BEGUN = 2
"""After so many steps with a case that did not come to an end, no other is begun: a compiler may crash."""
Step = Callable[[], None]
Written = Callable[[Mapping[str, Mapping[str, Config]]], object]
"""What is done with new tile sizes: by kernel and key."""


class DeviceLost(Exception):
    """A kernel has done what the device does not survive; nothing else runs in this process."""


@dataclasses.dataclass
class Runner:
    """Goes through the cases of some ops, and keeps what it finds."""

    record: Record
    device: torch.device
    sources: Mapping[str, str]
    """Hash of each op's source."""
    deadline: float = math.inf
    """As `time.monotonic` counts: no step begins after it."""
    written: Written = lambda table: None

    def run(self, cases: Mapping[str, Sequence[BenchCase]], *, tune: bool = False, timed: bool = True) -> int:
        """Does what is not done yet; returns how many steps the time was too short for.

        All ops are proven first; then, op after op, tile sizes are chosen and cases timed.

        Args:
            cases: by op, the most important op first.
            tune: whether tile sizes are chosen.
            timed: whether cases are timed; otherwise they are only proven.

        Raises:
            DeviceLost: if the device is gone; the record says with which case.
        """
        for op in cases:
            self._learn(op)
        steps = list(self._steps(cases, tune=tune, timed=timed))
        for number, step in enumerate(steps):
            if time.monotonic() >= self.deadline:
                return len(steps) - number
            step()
        return 0

    def wrong(self, ops: Iterable[str]) -> list[str]:
        """What was wrong with these ops, a sentence each."""
        found: list[str] = []
        for op in ops:
            known = self._of(op)
            found += [sentence for sentences in known.wrong.values() for sentence in sentences]
            left_out = [name for name, count in known.begun.items() if count >= MOST_BEGUN and name not in known.wrong]
            found += [f"{op}: {name} has not come to an end {known.begun[name]} times" for name in left_out]
        return found

    def _of(self, op: str) -> OpRecord:
        return self.record.of(op, source=self.sources[op])

    def _learn(self, op: str) -> None:
        """Launches take the tile sizes that an earlier run chose."""
        tuned = self._of(op).tuned
        for kernel, rows in tuned.items():
            triton_runtime.learn(kernel, rows=rows)
        if tuned:
            self.written(tuned)

    def _steps(self, cases: Mapping[str, Sequence[BenchCase]], *, tune: bool, timed: bool) -> Iterator[Step]:
        for op, listed in cases.items():
            known = self._of(op)
            # What failed before is tried again, but behind the others.
            done = {*known.proven, *_left_out(known)}
            pending = [case for case in listed if case.name not in done]
            pending.sort(key=lambda case: case.name in known.wrong)
            for start in range(0, len(pending), COMPILED_AT_ONCE):
                group = pending[start : start + COMPILED_AT_ONCE]
                yield functools.partial(self._compile, group)
                yield from (functools.partial(self._prove, case) for case in group)
        for op, listed in cases.items() if timed else ():
            left_out = _left_out(self._of(op))
            full = [case for case in listed if case.prepare is not None and case.name not in left_out]
            if tune:
                yield from (functools.partial(self._tune, case) for case in full if case.candidates)
            # Chosen tile sizes void what was timed with others: each is passed over, if at all, when its turn comes.
            yield from (functools.partial(self._time, case) for case in full)

    def _compile(self, cases: Sequence[BenchCase]) -> None:
        """Compiles what the checks launch, in parallel. What goes wrong here is found again by the proof."""
        known, name = self._of(cases[0].op), f"compiling {cases[0].name}"
        if self.device.type != "cuda" or name in known.begun:
            return
        self._begin(known, name=name)
        launches: list[Launch] = []
        for case in cases:
            try:
                with forced(case.op), recorded() as found:
                    case.check(self.device)
                launches += found
            except Exception as error:
                logger.debug("%s %s: %s", case.op, case.name, error)
        start = time.monotonic()
        count = compile_all(launches)
        del known.begun[name]
        self.record.save()
        logger.info("%s: %d kernels compiled in %.0f s", cases[0].op, count, time.monotonic() - start)

    def _prove(self, case: BenchCase) -> None:
        self._attempt(case, lambda: _proven(case, device=self.device, known=self._of(case.op)))

    def _tune(self, case: BenchCase) -> None:
        known = self._of(case.op)
        if case.name in known.wrong:
            return

        def keep(kernel: str, rows: Mapping[str, Config]) -> None:
            known.tuned.setdefault(kernel, {}).update(rows)
            # They were measured with other tile sizes.
            known.results.clear()
            triton_runtime.learn(kernel, rows=rows)
            self.record.save()
            self.written({kernel: known.tuned[kernel]})

        self._attempt(case, lambda: tuner.tune_case(case, table=known.tuned, device=self.device, keep=keep))

    def _time(self, case: BenchCase) -> None:
        known = self._of(case.op)
        if case.name in known.wrong or case.name in known.results:
            return

        def attempt() -> list[str]:
            # With the tile sizes that it is timed with.
            wrong = _proven(case, device=self.device, known=known)
            if not wrong:
                found = time_case(case, device=self.device, best=self.record.machine.ceiling)
                known.results[case.name] = found
            return wrong

        self._attempt(case, attempt)

    def _attempt(self, case: BenchCase, step: Callable[[], list[str]]) -> None:
        """Takes a step, and keeps what is wrong with it; another case goes on.

        Raises:
            DeviceLost: if none can.
        """
        known, lost = self._of(case.op), None
        self._begin(known, name=case.name)
        try:
            wrong = step()
        except Exception as error:  # A kernel fails in any way.
            wrong = [_failure(case, error)]
            lost = self._lost()
        del known.begun[case.name]
        known.wrong.pop(case.name, None)
        if wrong:
            known.wrong[case.name] = wrong
            known.proven = [name for name in known.proven if name != case.name]
            known.results.pop(case.name, None)
        logger.info("%s %s: %s", case.op, case.name, "; ".join(wrong) if wrong else "right")
        if lost:
            known.fatal.append(case.name)
        self.record.save()
        if lost:
            raise DeviceLost(f"{case.op}: {case.name} has brought the device down: {lost}")

    def _begin(self, known: OpRecord, *, name: str) -> None:
        """Keeps that a step has begun, for the case that this process does not see its end."""
        known.begun[name] = known.begun.get(name, 0) + 1
        self.record.save()

    def _lost(self) -> str | None:
        """What the device says where nothing runs on it any more."""
        if self.device.type != "cuda":
            return None
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            return _first_line(error)
        return None


def prove_all(cases: Iterable[BenchCase], *, device: torch.device) -> list[str]:
    """Proves every case; returns what is wrong, a sentence each. A case that fails to run is wrong."""
    wrong: list[str] = []
    for case in cases:
        try:
            found = prove(case, device=device)
        except Exception as error:  # A kernel fails in any way; the others are to be proven all the same.
            found = [_failure(case, error)]
        logger.info("%s %s: %s", case.op, case.name, "; ".join(found) if found else "right")
        wrong += found
    return wrong


def time_case(case: BenchCase, *, device: torch.device, best: Ceiling) -> Result:
    """Times one case, and each of its peers that runs.

    Raises:
        ValueError: if the case has nothing to be timed.
    """
    if case.prepare is None:
        raise ValueError(f"{case.name} is only proven")
    timed = case.prepare(device)
    with forced(case.op):
        own = measure(timed.run, device=device)
    peers = {name: _peer(make, device=device) for name, make in timed.peers.items()}
    if device.type == "cuda":
        # What a peer left broken is found here, and not with the next case.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    found = result(op=case.op, case=case.name, timed=timed, own=own, peers=peers, best=best)
    logger.info("%s %s: %.3g ms", case.op, case.name, own.seconds * 1e3)
    return found


def _left_out(known: OpRecord) -> set[str]:
    """Names of cases that no step is begun with any more."""
    return {*known.fatal, *(name for name, count in known.begun.items() if count >= MOST_BEGUN)}


def _proven(case: BenchCase, *, device: torch.device, known: OpRecord) -> list[str]:
    """Proves a case; returns what is wrong, and notes what is right."""
    with launched() as kernels:
        wrong = prove(case, device=device)
    if not wrong:
        known.proven = [*dict.fromkeys([*known.proven, case.name])]
        known.kernels = sorted({*known.kernels, *kernels})
    return wrong


def _peer(make: Callable[[], Callable[[], object]], *, device: torch.device) -> Measured | str:
    try:
        return measure(make(), device=device)
    except Exception as error:  # Whatever a peer fails with, out of memory first of all.
        return f"{type(error).__name__}: {_first_line(error)}"


def _failure(case: BenchCase, error: Exception) -> str:
    return f"{case.op}: {case.name} fails with {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
