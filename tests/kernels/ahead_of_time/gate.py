"""Runs `compile_all` for all architectures at once, each in a fresh process, and reads what they found.

`python -m tests.kernels.ahead_of_time.gate` writes the table that is kept; look at what changed in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

from tests.kernels.ahead_of_time.figures import COLUMNS

ROOT = Path(__file__).parents[3]
ARCHITECTURES = (80, 90, 100)
GOLDEN = ROOT / "tests/goldens/kernels" / f"triton-{triton.__version__}.tsv"
COMMAND = "python -m tests.kernels.ahead_of_time.gate"


def environment() -> dict[str, str]:
    """That of a process that compiles: no interpreter, a cache that later runs find again."""
    cache = Path(tempfile.gettempdir()) / f"megaseq-triton-{triton.__version__}-{os.getuid()}"
    return {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        # Versions differ in what they take where nothing is said.
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def compile_for(architectures: Sequence[int], *, options: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Compiles in parallel; returns (lines of the table without its header, what is wrong)."""
    module = "tests.kernels.ahead_of_time.compile_all"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(architecture), *options],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for architecture in architectures
    ]
    lines: list[str] = []
    wrong: list[str] = []
    for process, architecture in zip(processes, architectures, strict=True):
        out, err = process.communicate()
        lines += out.splitlines()[1:]
        wrong += [
            line for line in err.splitlines() if f" on sm_{architecture} " in line or "launches no kernel" in line
        ]
        if process.returncode not in (0, 1) or (process.returncode == 1 and not wrong):
            wrong.append(f"the process for sm_{architecture} died with {process.returncode}: {err[-2000:]}")
    return lines, wrong


def table(lines: Sequence[str]) -> str:
    """The kept form: a header, then the rows in order, all architectures of a kernel beside each other."""
    columns = len(COLUMNS)

    def key(line: str) -> tuple[object, ...]:
        fields = line.split("\t")
        numbers = [int(field) for field in fields[columns - 5 :]]
        return (*fields[: columns - 5], *numbers)

    return "\n".join(["\t".join(COLUMNS), *sorted(lines, key=key)]) + "\n"


def main() -> int:
    """Writes the table; returns 1 if something is wrong."""
    lines, wrong = compile_for(ARCHITECTURES)
    GOLDEN.write_text(table(lines))
    print(f"{GOLDEN.relative_to(ROOT)}: {len(lines)} rows")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
