"""What a run does: proves everything, times nothing that is wrong, keeps each step, goes on where it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench import record, runner, tuner
from megaseq.kernels.bench.record import Record
from megaseq.kernels.bench.results import Machine, Result
from megaseq.kernels.bench.runner import DeviceLost, Runner
from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, ready
from megaseq.kernels.triton_runtime import Config
from tests.kernels.bench.fakes import case, compared

HOST = torch.device("cpu")
BEST = Ceiling(bytes_per_second=1e12, flops_per_second=1e15)
MACHINE = Machine("H200", 90, {"triton": "3.6"}, "2026-01-02", BEST)
SIZES = [Config({"BLOCK": size}) for size in (16, 32)]


def new_runner(path: Path, **settings: object) -> Runner:
    kept = record.read(path) if path.is_file() else Record(path, MACHINE)
    return Runner(kept, device=HOST, sources={"dropout": "abc", "rotary": "def"}, **settings)  # type: ignore[arg-type]


def result(case: BenchCase) -> Result:
    return Result(case.op, case.name, 1.0, 0.0, 0, 0.0, "", {}, {})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the cases that were timed, in order."""
    names: list[str] = []

    def time_case(case: BenchCase, **_: object) -> Result:
        names.append(case.name)
        return result(case)

    monkeypatch.setattr(runner, "time_case", time_case)
    triton_runtime.forget_tables()
    yield names
    triton_runtime.forget_tables()


def broken(device: torch.device) -> Mapping[str, Comparison]:
    raise RuntimeError("out of shared memory\nand more")


def test_what_is_wrong_is_not_timed_and_the_others_are(timed: list[str], tmp_path: Path) -> None:
    cases = {"dropout": [case("a"), case("b", found=2.0), case("c", check=broken), case("d")]}
    run = new_runner(tmp_path / "run.json")
    assert run.run(cases) == 0
    assert timed == ["a", "d"]
    first, second = run.wrong(cases)
    assert "output of b is off" in first
    assert second == "dropout: c fails with RuntimeError: out of shared memory"
    kept = record.read(tmp_path / "run.json").ops["dropout"]
    assert kept.proven == ["a", "d"] and set(kept.wrong) == {"b", "c"} and set(kept.results) == {"a", "d"}


def test_cases_that_are_only_proven_come_first(timed: list[str], tmp_path: Path) -> None:
    proven: list[str] = []

    def checked(name: str) -> Callable[[torch.device], Mapping[str, Comparison]]:
        def check(device: torch.device) -> Mapping[str, Comparison]:
            proven.append(name)
            return {"output": compared(1.0, 1.0)}

        return check

    other = BenchCase("rotary", "only", checked("only"))
    run = new_runner(tmp_path / "run.json")
    run.run({"dropout": [case("full", check=checked("full"))], "rotary": [other]})
    # All ops are proven before anything is timed; what is timed is proven again, with the tile sizes of then.
    assert proven == ["full", "only", "full"] and timed == ["full"]
    run.run({"dropout": [case("full", check=checked("full"))]}, timed=False)
    assert len(proven) == 3


def test_a_second_run_goes_on(timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    cases = {"dropout": [case("a"), case("b")], "rotary": [case("c")]}
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    left = new_runner(path, deadline=4.0).run(cases)
    assert left > 0 and not timed
    proven = {name for op in record.read(path).ops.values() for name in op.proven}
    assert proven
    monkeypatch.undo()
    monkeypatch.setattr(runner, "time_case", lambda case, **_: timed.append(case.name) or result(case))
    assert new_runner(path).run(cases) == 0
    assert new_runner(path).run(cases) == 0
    assert timed == ["a", "b", "c"]


def test_other_ops_of_an_earlier_run_stay(timed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    new_runner(path).run({"dropout": [case("a")]})
    rotary = BenchCase("rotary", "b", lambda device: {"output": compared(1.0, 1.0)}, case("b").prepare)
    new_runner(path).run({"rotary": [rotary]})
    assert {op: list(found.results) for op, found in record.read(path).ops.items()} == {
        "dropout": ["a"],
        "rotary": ["b"],
    }


def test_what_was_wrong_is_tried_again_behind_the_others(timed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    new_runner(path).run({"dropout": [case("a", found=2.0)]})
    order: list[str] = []

    def check(name: str) -> Callable[[torch.device], Mapping[str, Comparison]]:
        return lambda device: order.append(name) or {"output": compared(1.0, 1.0)}

    run = new_runner(path)
    run.run({"dropout": [case("a", check=check("a")), case("b", check=check("b"))]}, timed=False)
    assert order == ["b", "a"] and run.wrong(["dropout"]) == []


def test_a_case_that_brings_the_device_down_is_not_tried_again(
    timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    monkeypatch.setattr(Runner, "_lost", lambda self: "an illegal memory access was encountered")
    cases = {"dropout": [case("a"), case("b", check=broken), case("c")]}
    with pytest.raises(DeviceLost, match="dropout: b has brought the device down: an illegal memory access"):
        new_runner(path).run(cases)
    run = new_runner(path)
    assert run.run(cases) == 0
    assert timed == ["a", "c"] and run.wrong(cases) == ["dropout: b fails with RuntimeError: out of shared memory"]


class Crash(BaseException):
    """The end of a process."""


def test_a_case_that_crashes_twice_is_left_out(timed: list[str], tmp_path: Path) -> None:
    path, tries = tmp_path / "run.json", []

    def crash(device: torch.device) -> Mapping[str, Comparison]:
        tries.append(1)
        raise Crash

    cases = {"dropout": [case("a", check=crash), case("b")]}
    for _ in range(2):
        with pytest.raises(Crash):
            new_runner(path).run(cases)
    run = new_runner(path)
    assert run.run(cases) == 0 and len(tries) == 2
    assert timed == ["b"] and run.wrong(cases) == ["dropout: a has not come to an end 2 times"]


def test_new_tile_sizes_void_what_was_timed_with_others(
    timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = tmp_path / "run.json", []

    def seconds(run: Callable[[], object], *, device: torch.device) -> Measured:
        config = run()
        assert isinstance(config, Config)
        return Measured(1.0 / config.blocks["BLOCK"], 0)

    monkeypatch.setattr(tuner.tune_case, "__kwdefaults__", {"measured": seconds})
    cases = {"dropout": [case("a", candidates={"double": SIZES})]}
    new_runner(path).run(cases)
    new_runner(path, written=written.append).run(cases, tune=True)
    assert timed == ["a", "a"] and written == [{"double": {"float32": SIZES[1]}}]
    # A later process launches with them, and has nothing more to do.
    triton_runtime.forget_tables()
    new_runner(path, written=written.append).run(cases, tune=True)
    assert timed == ["a", "a"] and len(written) == 2
    assert triton_runtime.config("double", key="float32", default=SIZES[0]) == SIZES[1]


def test_names_of_launched_kernels_are_kept(device: torch.device, timed: list[str], tmp_path: Path) -> None:
    from megaseq.kernels.catalogue import proof_cases

    rotary = next(found for found in proof_cases()["rotary"] if found.name == "part_fp32")
    run = new_runner(tmp_path / "run.json")
    run.device = device
    run.run({"rotary": [rotary]})
    assert run.record.ops["rotary"].kernels == ["rotate_kernel"] and run.wrong(["rotary"]) == []


def test_a_peer_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise NotImplementedError("no backward on this device")

    def cannot_be_made() -> Callable[[], object]:
        raise MemoryError("too large")

    seconds = iter([1e-9, 3e-9])

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        run()
        return Measured(next(seconds), 1 << 20)

    monkeypatch.setattr(runner, "measure", measured)
    peers = {"flex": ready(refuses), "huge": cannot_be_made, "plain": ready(lambda: None)}
    goals = {"plain": 2.5, "plain:memory": 1.5, "flex": 1.5, "ceiling": 0.9}
    timed = Timed(lambda: None, peers=peers, bytes=800.0, goals=goals)
    found = runner.time_case(case(timed=timed), device=HOST, best=BEST)
    assert found.peers["flex"] == "NotImplementedError: no backward on this device"
    assert found.peers["huge"] == "MemoryError: too large"
    assert found.ratio("plain") == pytest.approx(3) and found.ratio("flex") is None
    assert found.share_of_ceiling == pytest.approx(0.8) and found.rate == "800 GB/s"
    assert found.reached("plain:memory") == 1.0
    assert found.missed() == ["plain:memory", "flex", "ceiling"]
