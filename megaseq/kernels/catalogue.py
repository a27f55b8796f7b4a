"""All ops with kernels of their own: their cases, and a hash that tells whether a result is that of this source."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
from pathlib import Path

from megaseq.kernels.bench_case import BenchCase
from megaseq.kernels.compile_case import CompileCase

FOLDER = Path(__file__).parent
NO_CODE = ("bench.py", "cases.py", "proofs.py")
"""Files of an op that do not change what it computes."""
PACKAGE = "megaseq.kernels"
NO_KERNELS = ("", "bench_case", "catalogue", "checks", "compile_case", "dispatch", "functions", "triton_runtime")
"""Modules that ops import and that have no part in what kernels compute; "" is the package itself."""
FIRST = ("attention", "cross_entropy", "norm", "decode_attention", "beam_step")
"""The ops on which most depends: proven and timed before the others."""


def ops() -> tuple[str, ...]:
    """Names of all ops, those without kernels too."""
    folders = {module.name for module in pkgutil.iter_modules([str(FOLDER)]) if module.ispkg}
    return tuple(sorted(folders - {"bench"}))


def kernel_names(op: str) -> tuple[str, ...]:
    """Names of the op's Triton kernels in the order of their files: of what is launched, not of what kernels call."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / op).rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    launched = {
        ast.unparse(node.func.value).rpartition(".")[2]
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    return tuple(
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and node.name in launched
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    )


def ops_with_kernels() -> tuple[str, ...]:
    """Names of the ops that have Triton kernels."""
    return tuple(op for op in ops() if kernel_names(op))


def source_hash(op: str) -> str:
    """12 hexadecimal digits that change with the op's code, and with that of all that it imports from this package.

    The code is the Python files of its folder but those in `NO_CODE`. Its reference is part of it, which says what was
    proven.
    """
    digest = hashlib.sha256()
    for path in _sources(op):
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(op: str) -> list[Path]:
    """The files that `source_hash` is of."""
    found: set[Path] = set()
    pending = [path for path in (FOLDER / op).rglob("*.py") if path.name not in NO_CODE]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += [other for other in _imported(path) if other.name not in NO_CODE]
    return sorted(found)


def _imported(path: Path) -> list[Path]:
    """The files of this package that a file imports, anywhere in it, but those in `NO_KERNELS`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a module or something in one.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix(PACKAGE).lstrip(".") for name in names if f"{name}.".startswith(f"{PACKAGE}.")}
    places = [FOLDER.joinpath(*name.split(".")) for name in inside - set(NO_KERNELS)]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in files if file.is_file()]


def compile_cases() -> dict[str, list[CompileCase]]:
    """By op: what is compiled ahead of time."""
    return {op: module.compile_cases() for op, module in _modules("cases") if hasattr(module, "compile_cases")}


def bench_cases() -> dict[str, list[BenchCase]]:
    """By op, the most important first: what is proven and timed on a GPU."""
    return {op: module.bench_cases() for op, module in _modules("bench") if hasattr(module, "bench_cases")}


def proof_cases() -> dict[str, list[BenchCase]]:
    """By op, the most important first: what is only proven, on a GPU."""
    return {op: module.proof_cases() for op, module in _modules("proofs") if hasattr(module, "proof_cases")}


def _modules(name: str) -> list[tuple[str, object]]:
    """(op, module) of each op that has a module of this name, the most important op first."""
    ordered = [*FIRST, *(op for op in ops() if op not in FIRST)]
    paths = {op: f"{PACKAGE}.{op}.{name}" for op in ordered}
    return [(op, importlib.import_module(path)) for op, path in paths.items() if importlib.util.find_spec(path)]
