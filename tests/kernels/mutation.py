"""Plants faults in the package, one at a time, to see whether tests find them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAILED = 1
"""Exit code of pytest where tests ran and some failed."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: a text of one file replaced by another."""

    name: str
    file: str
    """Path below the package, such as "kernels/attention/triton_forward.py"."""
    old: str
    """What is replaced; must occur once in the file."""
    new: str

    def text(self) -> str:
        """The file with the fault.

        Raises:
            ValueError: if the file has changed so that `old` is not in it, or more than once.
        """
        source = (ROOT / "megaseq" / self.file).read_text(encoding="utf-8")
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"mutant {self.name}: {self.file} must have its text once, but has it {count} times")
        return source.replace(self.old, self.new)


def run_with(mutant: Mutant | None, *, tests: Sequence[str], folder: Path) -> tuple[bool, str]:
    """Runs tests in a process that imports a copy of the package with the fault.

    Args:
        mutant: the fault; None for a run without one, which must pass for the others to mean anything.
        tests: pytest's arguments, such as "tests/kernels/attention/test_triton.py::test_forward"; paths from the root.
        folder: an empty folder for the copy.

    Returns:
        (whether a test failed, the end of the output).

    Raises:
        RuntimeError: if the tests did not run, with the fault or without: that finds nothing.
    """
    copy = folder / "megaseq"
    shutil.copytree(ROOT / "megaseq", copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (copy / mutant.file).write_text(mutant.text(), encoding="utf-8")
    options = [str(ROOT / test) if test.startswith("tests/") else test for test in tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *options],
        # Where Python looks first.
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    end = f"{done.stdout[-3000:]}{done.stderr[-1000:]}"
    if done.returncode not in (0, FAILED):
        name = "the package as it is" if mutant is None else mutant.name
        raise RuntimeError(f"{name}: pytest ended with {done.returncode}, so that nothing was tested\n{end}")
    return done.returncode == FAILED, end


def problems(mutants: Sequence[Mutant], *, tests: Sequence[str], folder: Path) -> list[str]:
    """Plants each fault; returns a line for each that no test finds, or whose place is gone.

    Raises:
        RuntimeError: if a test fails without a fault.
    """
    (folder / "none").mkdir()
    failed, end = run_with(None, tests=tests, folder=folder / "none")
    if failed:
        raise RuntimeError(f"tests must pass without a fault, but\n{end}")
    found: list[str] = []
    for number, mutant in enumerate(mutants):
        place = folder / str(number)
        place.mkdir()
        try:
            failed, _ = run_with(mutant, tests=tests, folder=place)
        except ValueError as error:
            found.append(str(error))
            continue
        finally:
            shutil.rmtree(place)
        if not failed:
            found.append(f"mutant {mutant.name}: no test finds it")
    return found
