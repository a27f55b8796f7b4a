"""Runs `compile_all` for all architectures at once, each in a fresh process, and reads what they found.

`python -m tests.kernels.ahead_of_time.gate [OP ...]` writes the tables that are kept, one for each op, in a folder for
each version of Triton; look at what changed in them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

from megaseq.kernels.catalogue import ops_with_kernels
from tests.kernels.ahead_of_time.figures import COLUMNS

ROOT = Path(__file__).parents[3]
ARCHITECTURES = (80, 90, 100)
SMALL = (89, 120)
"""Cards with less shared memory, of which only is asked whether what would be launched there fits."""
TABLES = ROOT / "tests/goldens/kernels" / f"triton-{triton.__version__}"
"""One file for each op: what its kernels take of each architecture when this version of Triton compiles them."""
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


def check_launched(*, options: Sequence[str] = ()) -> list[str]:
    """What is wrong with what would be launched on small cards."""
    return compile_for(SMALL, options=["--launched", *options])[1]


def tables(lines: Sequence[str]) -> dict[str, str]:
    """The kept form, by op: a header, then the rows in order, all architectures of a kernel beside each other."""
    columns = len(COLUMNS)

    def key(line: str) -> tuple[object, ...]:
        fields = line.split("\t")
        numbers = [int(field) for field in fields[columns - 5 :]]
        return (*fields[: columns - 5], *numbers)

    rows: dict[str, list[str]] = {}
    for line in sorted(lines, key=key):
        rows.setdefault(line.partition("\t")[0], ["\t".join(COLUMNS)]).append(line)
    return {op: "\n".join(rows_of_op) + "\n" for op, rows_of_op in rows.items()}


def kept() -> dict[str, str]:
    """The tables that were written before, by op."""
    return {path.stem: path.read_text() for path in sorted(TABLES.glob("*.tsv"))}


def main() -> int:
    """Writes the tables; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these; without any all, and tables of others go")
    ops = parser.parse_args().ops
    unknown = ", ".join(sorted(set(ops) - set(ops_with_kernels())))
    if unknown:
        parser.error(f"OP must have kernels, but is {unknown}; take of {', '.join(ops_with_kernels())}")
    lines, wrong = compile_for(ARCHITECTURES, options=["--ops", *ops] if ops else [])
    wrong += check_launched(options=["--ops", *ops] if ops else [])
    TABLES.mkdir(exist_ok=True)
    for op in () if ops else kept().keys() - tables(lines).keys():
        (TABLES / f"{op}.tsv").unlink()
    for op, text in tables(lines).items():
        (TABLES / f"{op}.tsv").write_text(text)
    print(f"{TABLES.relative_to(ROOT)}: {len(lines)} rows")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
