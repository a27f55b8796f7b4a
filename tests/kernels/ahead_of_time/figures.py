"""What a compiled kernel takes of a GPU, as a row of a table; which rows are wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a block may have, from NVIDIA's tuning guides of the architectures."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The instruction of each architecture that multiplies matrices at full speed."""


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """One kernel, compiled once. All fields are text or numbers, in the order of the table's columns."""

    op: str
    case: str
    kernel: str
    types: str
    """Of the tensors, each once."""
    constants: str
    """Compile-time arguments and launch options; true ones by name alone, false ones left out."""
    architecture: int
    registers: int
    """Of a thread."""
    spill_bytes: int
    """Stored to memory by a thread for want of registers."""
    shared_bytes: int
    """Of a block."""
    tensor_cores: int
    """Instructions in the code that multiply matrices as fast as the architecture can."""


def spill_bytes(ptx: str, *, architecture: int) -> int:
    """Bytes that the assembler spills: it says so when it is asked to talk."""
    try:
        assembler = get_ptxas(architecture).path
    except TypeError:  # Triton 3.6 has one for all.
        assembler = get_ptxas().path
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump did not say what the kernel takes: {said}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def figures(compiled: Any, *, architecture: int, remembered: Path) -> dict[str, int]:
    """The figures of a compiled kernel, by the names of `Row`; kept in the folder `remembered`, as each costs a second.

    Raises:
        ValueError: if the kernel was compiled for another architecture.
    """
    target = compiled.metadata.target
    if target.arch != architecture:
        raise ValueError(f"{compiled.name} was compiled for sm_{target.arch}, not for sm_{architecture}")
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    kept = remembered / f"{hashlib.sha256(cubin + ptx.encode()).hexdigest()}.json"
    if not kept.is_file():
        taken = usage(cubin)
        spilled = spill_bytes(ptx, architecture=architecture) if taken["stack"] else 0
        remembered.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"registers": taken["registers"], "spill_bytes": spilled}))
    return {
        **json.loads(kept.read_text()),
        "shared_bytes": compiled.metadata.shared,
        # Not inside of longer names.
        "tensor_cores": len(re.findall(rf"(?<![\w.]){re.escape(TENSOR_CORES[architecture])}", ptx)),
    }


def too_large(shared_bytes: int, *, architecture: int) -> list[str]:
    """What is wrong with a kernel that takes so much shared memory, if anything is."""
    limit = SHARED_LIMIT[architecture]
    return [f"takes {shared_bytes} bytes of shared memory, of {limit} that exist"] if shared_bytes > limit else []


def problems(row: Row, *, spill_budget: int, wants_tensor_cores: bool) -> list[str]:
    """What is wrong with a row, in sentences."""
    found = too_large(row.shared_bytes, architecture=row.architecture)
    if row.spill_bytes > spill_budget:
        found.append(f"spills {row.spill_bytes} bytes, of {spill_budget} that its case allows")
    if wants_tensor_cores and not row.tensor_cores:
        found.append(f"has no {TENSOR_CORES[row.architecture]}, though its products are meant for tensor cores")
    where = f"{row.op}: {row.kernel} of {row.case} ({row.types} {row.constants}) on sm_{row.architecture}"
    return [f"{where} {problem}" for problem in found]


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def to_table(rows: list[Row]) -> str:
    """The rows as tab-separated text with a header, sorted."""
    lines = ["\t".join(COLUMNS), *("\t".join(map(str, dataclasses.astuple(row))) for row in sorted(rows))]
    return "\n".join(lines) + "\n"
