"""The tuner takes the fastest tile sizes that are right, and what it writes is what launches read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench.record import Table
from megaseq.kernels.bench.results import Machine
from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.bench.tuner import tune_case, write_table, written_to
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed
from megaseq.kernels.triton_runtime import Config
from tests.kernels.bench.fakes import DEFAULT, case, compared

HOST = torch.device("cpu")
SIZES = [Config({"BLOCK": size}) for size in (16, 32, 64, 128)]


def used(kernel: str = "double") -> int:
    """The tile size that a launch takes now."""
    return triton_runtime.config(kernel, key="float32", default=DEFAULT).blocks["BLOCK"]


def tune(cases: list[BenchCase], *, measured: Callable[..., Measured], wrong: list[str] | None = None) -> Table:
    """What is chosen for the cases, one after the other."""
    table: Table = {}

    def keep(kernel: str, rows: Mapping[str, Config]) -> None:
        table.setdefault(kernel, {}).update(rows)

    for one in cases:
        found = tune_case(one, table=table, device=HOST, keep=keep, measured=measured)
        if wrong is not None:
            wrong += found
    return table


def by_size(seconds: dict[int, float]) -> Callable[..., Measured]:
    """A clock that tells the time by the tile size; a size without a time does not fit the card."""

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        run()
        return Measured(seconds[used()], 0)

    return measured


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(triton_runtime, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(triton_runtime, "architecture", lambda: 90)
    triton_runtime.forget_tables()
    yield tmp_path / "tuned"
    triton_runtime.forget_tables()


@pytest.mark.usefixtures("tables")
def test_the_fastest_is_taken() -> None:
    table = tune([case(candidates={"double": SIZES})], measured=by_size({16: 4, 32: 2, 64: 1, 128: 3}))
    assert table == {"double": {"float32": SIZES[2]}}


@pytest.mark.usefixtures("tables")
def test_what_does_not_fit_is_passed_over() -> None:
    table = tune([case(candidates={"double": SIZES})], measured=by_size({16: 4, 32: 2}))
    assert table == {"double": {"float32": SIZES[1]}}
    assert tune([case(candidates={"double": SIZES})], measured=by_size({})) == {}


@pytest.mark.usefixtures("tables")
def test_nothing_is_tried_with_a_kernel_that_is_wrong() -> None:
    wrong: list[str] = []
    cases = [case(found=7.0, candidates={"double": SIZES}), case("right", candidates={"double": SIZES[:2]})]
    table = tune(cases, measured=by_size({16: 2, 32: 1}), wrong=wrong)
    assert table == {"double": {"float32": SIZES[1]}}
    assert len(wrong) == 1 and "output of shape is off" in wrong[0]


@pytest.mark.usefixtures("tables")
def test_kernels_that_do_not_run_are_not_tuned() -> None:
    table = tune([case(candidates={"double": SIZES[:2], "triple": SIZES})], measured=by_size({16: 2, 32: 1}))
    assert table == {"double": {"float32": SIZES[1]}}


@pytest.mark.usefixtures("tables")
def test_what_is_known_is_not_even_proven() -> None:
    def check(device: torch.device) -> dict[str, Comparison]:
        raise AssertionError("nothing is to be done")

    known = case(candidates={"double": SIZES}, check=check)
    table: Table = {"double": {"float32": SIZES[3]}}
    assert tune_case(known, table=table, device=HOST, keep=lambda *_: None) == []


@pytest.mark.usefixtures("tables")
def test_what_is_wrong_is_passed_over() -> None:
    def check(device: torch.device) -> dict[str, Comparison]:
        return {"output": compared(1.0 if used() < 64 else 7.0, 1.0)}

    cases = [case(candidates={"double": SIZES}, check=check)]
    assert tune(cases, measured=by_size({16: 4, 32: 2, 64: 1, 128: 1})) == {"double": {"float32": SIZES[1]}}


@pytest.mark.usefixtures("tables")
def test_the_first_case_of_a_key_decides() -> None:
    clock = iter([1.0, 2.0])

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        return Measured(next(clock), 0)

    cases = [case("a", candidates={"double": SIZES[:2]}), case("b", candidates={"double": SIZES[2:]})]
    assert tune(cases, measured=measured) == {"double": {"float32": SIZES[0]}}


@pytest.mark.usefixtures("tables")
def test_kernels_are_tuned_one_after_the_other() -> None:
    """The second kernel is timed with the best sizes of the first."""

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        return Measured(10 * abs(used("double") - 32) + abs(used("triple") - 2 * used("double")), 0)

    def run() -> None:
        used("double")
        used("triple")

    cases = [case(timed=Timed(run), candidates={"double": SIZES, "triple": SIZES})]
    table = tune(cases, measured=measured)
    assert table == {"double": {"float32": SIZES[1]}, "triple": {"float32": SIZES[2]}}


def test_a_written_table_is_used(tables: Path) -> None:
    assert used() == 16
    settings = {"folder": tables, "architecture": 90, "card": "H200", "versions": {"triton": "3.6"}}
    path = write_table({"double": {"float32": SIZES[1]}}, **settings)  # type: ignore[arg-type]
    triton_runtime.forget_tables()
    assert path == tables / "sm_90.json" and used() == 32
    # What another run chose for other kernels stays.
    write_table({"triple": {"float32": SIZES[3]}}, **settings)  # type: ignore[arg-type]
    triton_runtime.forget_tables()
    assert (used(), used("triple")) == (32, 128)
    content = json.loads(path.read_text())
    assert content["card"] == "H200" and content["versions"] == {"triton": "3.6"}


def test_nothing_is_written_for_other_architectures(tables: Path) -> None:
    write_table({"double": {"float32": SIZES[1]}}, folder=tables, architecture=80, card="A100", versions={})
    triton_runtime.forget_tables()
    assert used() == 16


def test_what_is_learnt_goes_before_the_tables(tables: Path) -> None:
    write_table({"double": {"float32": SIZES[1]}}, folder=tables, architecture=90, card="H200", versions={})
    triton_runtime.learn("double", rows={"float32": SIZES[2]})
    assert used() == 64
    with triton_runtime.override(double=SIZES[3]):
        assert used() == 128
    triton_runtime.forget_tables()
    assert used() == 32


def test_a_package_that_cannot_be_written_to_is_no_error(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(triton_runtime, "TABLES", tmp_path / "file" / "tuned")
    machine = Machine("H200", 90, {}, "2026-01-02", Ceiling(1, 1))
    written_to(tmp_path / "out", machine=machine)({"double": {"float32": SIZES[1]}})
    assert (tmp_path / "out" / "sm_90.json").is_file()
