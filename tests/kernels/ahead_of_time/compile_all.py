"""Compiles all cases for one architecture, in a process of its own.

Prints a table of what was compiled to stdout; to stderr what is wrong, a line each, and exits with 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megaseq.kernels import triton_runtime
from megaseq.kernels.catalogue import compile_cases
from megaseq.kernels.compile_case import CompileCase
from tests.kernels.ahead_of_time.driver import compiling
from tests.kernels.ahead_of_time.figures import Row, figures, problems, to_table, too_large


def compile_all(
    cases: Mapping[str, Sequence[CompileCase]], *, architecture: int, remembered: Path
) -> tuple[list[Row], list[str]]:
    """Compiles the cases of each op; returns (rows of the table, what is wrong)."""
    rows: list[Row] = []
    wrong: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    for op, case in ((op, case) for op, cases_of_op in cases.items() for case in cases_of_op):
        if architecture < case.minimum_architecture:
            continue
        # Triton prints what the assembler refuses.
        with compiling(architecture) as launches, contextlib.redirect_stdout(io.StringIO()):
            case.run()
        if not launches:
            wrong.append(f"{op}: case {case.name} launches no kernel")
        for launch in launches:
            where = f"{op}: {launch.kernel} of {case.name} ({launch.types} {launch.constants}) on sm_{architecture}"
            if launch.compiled is None:
                wrong.append(f"{where} does not compile: {' '.join(launch.error.split())[:400]}")
                continue
            # Cases may overlap; Triton gives the same kernel again.
            key = (op, launch.kernel, launch.compiled.hash)
            if key in seen:
                continue
            seen.add(key)
            found = figures(launch.compiled, architecture=architecture, remembered=remembered)
            row = Row(op, case.name, launch.kernel, launch.types, launch.constants, architecture, **found)
            rows.append(row)
            meant = launch.kernel in case.tensor_cores and architecture not in case.tensor_cores_unknown_on
            wrong += problems(row, spill_budget=case.spill_bytes, wants_tensor_cores=meant)
    return rows, wrong


def check_launched(cases: Mapping[str, Sequence[CompileCase]], *, architecture: int) -> list[str]:
    """Compiles what the ops would launch on an architecture whatever tiles the cases name; returns what is wrong: what
    does not compile, and what takes more shared memory than there is."""
    wrong: dict[str, None] = {}
    for op, case in ((op, case) for op, cases_of_op in cases.items() for case in cases_of_op):
        if architecture < case.minimum_architecture:
            continue
        deaf = mock.patch.object(triton_runtime, "_overrides", _Deaf())
        with compiling(architecture) as launches, contextlib.redirect_stdout(io.StringIO()), deaf:
            case.run()
        for launch in launches:
            where = f"{op}: {launch.kernel} of {case.name} ({launch.types} {launch.constants}) on sm_{architecture}"
            if launch.compiled is None:
                wrong[f"{where} does not compile: {' '.join(launch.error.split())[:400]}"] = None
                continue
            found = too_large(launch.compiled.metadata.shared, architecture=architecture)
            wrong.update(dict.fromkeys(f"{where} {problem}" for problem in found))
    return list(wrong)


class _Deaf(dict[str, triton_runtime.Config]):
    """Tile sizes that are never overridden."""

    def update(self, *_: Any, **__: Any) -> None:
        pass


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", type=int, help="compute capability without the point, as in sm_90")
    parser.add_argument("--cases", help="module whose compile_cases() are taken instead of those of all ops")
    parser.add_argument("--ops", nargs="+", help="only these")
    parser.add_argument("--launched", action="store_true", help="only what would be launched, and whether it fits")
    arguments = parser.parse_args()
    cases = {arguments.cases: importlib.import_module(arguments.cases).compile_cases()} if arguments.cases else None
    cases = cases or {op: found for op, found in compile_cases().items() if op in (arguments.ops or [op])}
    remembered = Path(os.environ["TRITON_CACHE_DIR"]) / "figures"
    if arguments.launched:
        rows, wrong = [], check_launched(cases, architecture=arguments.architecture)
    else:
        rows, wrong = compile_all(cases, architecture=arguments.architecture, remembered=remembered)
    print(to_table(rows), end="")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
