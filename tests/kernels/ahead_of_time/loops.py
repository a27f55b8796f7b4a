"""Counts the instructions in the innermost loops of kernels: what a tile costs, as far as no device is needed to know.

    TRITON_INTERPRET=0 python -m tests.kernels.ahead_of_time.loops 90 attention fp16_table

compiles a case of an op for an architecture, and prints a line for each kernel: its loops, in order.
Instructions of one warp for one pass; how long they take, and what runs beside, only a device says.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile

from megaseq.kernels.catalogue import compile_cases
from tests.kernels.ahead_of_time.driver import compiling
from tests.kernels.ahead_of_time.figures import TOOLS

_LABEL = re.compile(r"\s*(\.L_\S+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA.*`\((\.L_\S+)\)")


def loops(code: str, *, at_least: int = 40) -> list[int]:
    """Instructions of each innermost loop of disassembled `code` that has at least so many."""
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    count = 0
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif instruction := _INSTRUCTION.match(line):
            if jump := _BRANCH.search(instruction[1]):
                jumps.append((count, jump[1]))
            count += 1
    spans = [(labels[label], end) for end, label in jumps if labels.get(label, count) <= end]
    inner = sorted(span for span in spans if not any(_holds(span, other) for other in spans))
    return [end - begin + 1 for begin, end in inner if end - begin + 1 >= at_least]


def _holds(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other != span and span[0] <= other[0] and other[1] <= span[1]


def disassembled(cubin: bytes) -> str:
    """The instructions of a binary, with labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", type=int, help="compute capability without the point, as in sm_90")
    parser.add_argument("op")
    parser.add_argument("case")
    arguments = parser.parse_args()
    cases = {case.name: case for case in compile_cases().get(arguments.op, [])}
    if arguments.case not in cases:
        parser.error(f"case must be one of op {arguments.op}: {', '.join(cases) or 'none'}")
    with compiling(arguments.architecture) as launches:
        cases[arguments.case].run()
    for launch in launches:
        found = launch.error if launch.compiled is None else loops(disassembled(launch.compiled.asm["cubin"]))
        print(f"{launch.kernel}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
