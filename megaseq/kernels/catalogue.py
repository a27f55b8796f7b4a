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
NO_CODE = ("bench.py", "cases.py", "reference.py")
"""Files of an op that do not change what its kernels do."""


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
    """12 hexadecimal digits that change with the op's code: all Python files of its folder but those in `NO_CODE`."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / op).rglob("*.py")):
        if path.name not in NO_CODE:
            digest.update(f"{path.relative_to(FOLDER).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def compile_cases() -> dict[str, list[CompileCase]]:
    """By op: what is compiled ahead of time."""
    return {op: module.compile_cases() for op, module in _modules("cases") if hasattr(module, "compile_cases")}


def bench_cases() -> dict[str, list[BenchCase]]:
    """By op: what is proven and timed on a GPU."""
    return {op: module.bench_cases() for op, module in _modules("bench") if hasattr(module, "bench_cases")}


def _modules(name: str) -> list[tuple[str, object]]:
    """(op, module) of each op that has a module of this name."""
    paths = {op: f"megaseq.kernels.{op}.{name}" for op in ops()}
    return [(op, importlib.import_module(path)) for op, path in paths.items() if importlib.util.find_spec(path)]
