"""Planted faults: found, not found, stale, and not even run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.kernels import mutation
from tests.kernels.mutation import Mutant

TESTS = ["tests/kernels/test_dispatch.py"]
FAULT = Mutant("wrong variable", "kernels/dispatch.py", "os.environ[VARIABLE]", 'os.environ.get("X", "auto")')
HARMLESS = dataclasses.replace(FAULT, name="harmless", new='os.environ.get(VARIABLE, "auto")')


def test_the_place_must_be_there_once() -> None:
    assert FAULT.new in FAULT.text() and FAULT.old not in FAULT.text()
    with pytest.raises(ValueError, match="must have its text once, but has it 0 times"):
        dataclasses.replace(FAULT, old="no such text").text()


@pytest.mark.slow
def test_faults_are_found_and_others_reported(tmp_path: Path) -> None:
    stale = dataclasses.replace(FAULT, name="stale", old="no such text")
    found = mutation.problems([FAULT, HARMLESS, stale], tests=TESTS, folder=tmp_path)
    assert found[0] == "mutant harmless: no test finds it"
    assert found[1].startswith("mutant stale: kernels/dispatch.py must have its text once")
    assert len(found) == 2


@pytest.mark.slow
def test_a_fault_that_breaks_the_import_finds_nothing(tmp_path: Path) -> None:
    broken = dataclasses.replace(FAULT, name="broken", new="os.environ.get(")
    with pytest.raises(RuntimeError, match="broken: pytest ended with"):
        mutation.run_with(broken, tests=TESTS, folder=tmp_path)
