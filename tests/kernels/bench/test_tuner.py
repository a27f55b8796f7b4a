"""The tuner takes the fastest tile sizes that are right, and what it writes is what launches read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench.timing import Measured
from megaseq.kernels.bench.tuner import tune, write_table
from megaseq.kernels.bench_case import Comparison, Timed
from megaseq.kernels.triton_runtime import Config
from tests.kernels.bench.fakes import DEFAULT, case, compared

HOST = torch.device("cpu")
SIZES = [Config({"BLOCK": size}) for size in (16, 32, 64, 128)]


def used(kernel: str = "double") -> int:
    """The tile size that a launch takes now."""
    return triton_runtime.config(kernel, key="float32", default=DEFAULT).blocks["BLOCK"]


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
    table = tune([case(candidates={"double": SIZES})], device=HOST, measured=by_size({16: 4, 32: 2, 64: 1, 128: 3}))
    assert table == {"double": {"float32": SIZES[2]}}


@pytest.mark.usefixtures("tables")
def test_what_does_not_fit_is_passed_over() -> None:
    table = tune([case(candidates={"double": SIZES})], device=HOST, measured=by_size({16: 4, 32: 2}))
    assert table == {"double": {"float32": SIZES[1]}}
    assert tune([case(candidates={"double": SIZES})], device=HOST, measured=by_size({})) == {"double": {}}


@pytest.mark.usefixtures("tables")
def test_what_is_wrong_is_passed_over() -> None:
    def check(device: torch.device) -> dict[str, Comparison]:
        return {"output": compared(1.0 if used() < 64 else 7.0, 1.0)}

    cases = [case(candidates={"double": SIZES}, check=check)]
    assert tune(cases, device=HOST, measured=by_size({16: 4, 32: 2, 64: 1, 128: 1})) == {
        "double": {"float32": SIZES[1]}
    }


@pytest.mark.usefixtures("tables")
def test_the_first_case_of_a_key_decides() -> None:
    clock = iter([1.0, 2.0])

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        return Measured(next(clock), 0)

    cases = [case("a", candidates={"double": SIZES[:2]}), case("b", candidates={"double": SIZES[2:]})]
    assert tune(cases, device=HOST, measured=measured) == {"double": {"float32": SIZES[0]}}


@pytest.mark.usefixtures("tables")
def test_kernels_are_tuned_one_after_the_other() -> None:
    """The second kernel is timed with the best sizes of the first."""

    def measured(run: Callable[[], object], *, device: torch.device) -> Measured:
        return Measured(10 * abs(used("double") - 32) + abs(used("triple") - 2 * used("double")), 0)

    def run() -> None:
        used("double")
        used("triple")

    cases = [case(timed=Timed(run), candidates={"double": SIZES, "triple": SIZES})]
    table = tune(cases, device=HOST, measured=measured)
    assert table == {"double": {"float32": SIZES[1]}, "triple": {"float32": SIZES[2]}}


def test_a_written_table_is_used(tables: Path) -> None:
    assert used() == 16
    path = write_table({"double": {"float32": SIZES[1]}}, architecture=90, card="H200", versions={"triton": "3.6"})
    assert path == tables / "sm_90.json" and used() == 32
    # What another run chose for other kernels stays.
    write_table({"triple": {"float32": SIZES[3]}}, architecture=90, card="H200", versions={"triton": "3.6"})
    assert (used(), used("triple")) == (32, 128)
    content = json.loads(path.read_text())
    assert content["card"] == "H200" and content["versions"] == {"triton": "3.6"}


def test_nothing_is_written_for_other_architectures(tables: Path) -> None:
    write_table({"double": {"float32": SIZES[1]}}, architecture=80, card="A100", versions={})
    assert used() == 16
