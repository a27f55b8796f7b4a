"""The rules of the house: arrows go down, files and functions stay short, nothing is unpickled."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megaseq"

# A package may import itself and those of the levels above it in this list.
LEVELS = (
    ("base",),
    ("kernels", "parallel", "quant", "data"),
    ("layers", "learner", "checkpoint"),
    ("decode",),
    ("tasks",),
    ("train", "inference", "interop"),
    ("experiments",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Seen through a protocol or as plain data only, though the levels would allow more.
FORBIDDEN_ARROWS = {("decode", "layers"), ("inference", "layers"), ("inference", "tasks")}
ONLY_MODULE = {("layers", "parallel"): "megaseq.parallel.spec"}

OPTIONAL_PACKAGES = {"deepspeed", "triton", "apex", "wandb", "transformers", "fastapi", "tensorboard"}

# Their arguments have one natural order that every caller knows, or an order that torch gives them.
POSITIONAL_BY_NATURE = {"must", "sentence", "data_error", "add_slot", "backward_one_chunk"}

FRAMEWORK_DECORATORS = ("triton.jit", "torch.library.custom_op")

MAX_POSITIONAL, MAX_ARGUMENTS = 2, 8
MAX_FILE_LINES, MAX_KERNEL_FILE_LINES, MAX_FUNCTION_LINES = 600, 800, 100


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`data/input.py`, for messages."""
    return path.relative_to(PACKAGE).as_posix()


def imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_problems(module: ast.Module, *, package: str) -> list[str]:
    """The arrows of one file of `package` that go where they must not."""
    found: list[str] = []
    for line, target in imports(module):
        parts = target.split(".")
        if parts[0] in OPTIONAL_PACKAGES:
            found.append(f"{line}: {target} is optional: import it through base.optional()")
        if parts[0] != "megaseq" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == package:
            continue
        arrow = (package, parts[1])
        if LEVEL[parts[1]] >= LEVEL[package]:
            found.append(f"{line}: {package} must not import {target}: it is not below")
        elif arrow in FORBIDDEN_ARROWS:
            found.append(f"{line}: {package} must not import {target}: it sees models through a protocol")
        elif arrow in ONLY_MODULE and not target.startswith(ONLY_MODULE[arrow]):
            found.append(f"{line}: {package} may import only {ONLY_MODULE[arrow]} of {parts[1]}")
    return found


def unpickling(module: ast.Module) -> list[str]:
    """Calls that would run code out of a file."""
    found: list[str] = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        if owner in ("pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"):
            found.append(f"{node.lineno}: {owner}.{node.func.attr}")
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if owner == "torch" and node.func.attr == "load" and options.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if owner in ("np", "numpy") and node.func.attr == "load" and options.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: numpy.load with allow_pickle")
    return found


def long_functions(module: ast.Module) -> list[str]:
    """Functions over the limit, decorators not counted."""
    return [
        f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def argument_problems(module: ast.Module) -> list[str]:
    """Public functions with too many positional arguments (a subject and its object are two), or too many in all.

    What a framework calls (private names, `forward` and `backward` with a `ctx`, ops registered with torch) has the
    signature of the framework, and a kernel takes every pointer, stride and tile size as an argument of its own.
    """
    found: list[str] = []
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name in POSITIONAL_BY_NATURE:
            continue
        if any(ast.unparse(decorator).startswith(FRAMEWORK_DECORATORS) for decorator in node.decorator_list):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if names[:1] == ["ctx"]:
            continue
        names = names[1:] if names[:1] in (["self"], ["cls"], ["cls_"]) else names
        if len(names) > MAX_POSITIONAL:
            found.append(
                f"{node.lineno}: {node.name} takes {len(names)} positional arguments: write * before the others"
            )
        if len(names) + len(node.args.kwonlyargs) > MAX_ARGUMENTS:
            found.append(f"{node.lineno}: {node.name} takes more than {MAX_ARGUMENTS} arguments: make a Params of them")
    return found


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_arrows_go_down(path: Path) -> None:
    package = path.relative_to(PACKAGE).parts[0]
    if package in LEVEL:
        assert import_problems(tree(path), package=package) == []


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    limit = MAX_KERNEL_FILE_LINES if path.is_relative_to(PACKAGE / "kernels") else MAX_FILE_LINES
    assert len(lines) <= limit, f"{name_of(path)} has {len(lines)} lines"
    assert long_functions(tree(path)) == []


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_functions_take_few_arguments(path: Path) -> None:
    assert argument_problems(tree(path)) == []


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_nothing_is_unpickled(path: Path) -> None:
    assert unpickling(tree(path)) == []


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_every_module_says_what_it_is_and_has_late_annotations(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "a module begins with its docstring"
    if len(module.body) > 1:
        assert (module.body[1].lineno, "__future__.annotations") in list(imports(module))


def test_folders_of_tests_whose_files_share_a_name_are_packages() -> None:
    """Otherwise pytest takes the second file for the first."""
    bare = [path for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    names = [path.name for path in bare]
    assert [str(path.relative_to(ROOT)) for path in bare if names.count(path.name) > 1] == []


def test_every_package_has_a_level() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= LEVEL.keys()


def test_no_cycle_between_modules_of_base_at_import() -> None:
    graph = {
        f"megaseq.base.{path.stem}": {name for _, name in imports(ast.Module(_eager(tree(path)), type_ignores=[]))}
        for path in (PACKAGE / "base").glob("*.py")
        if path.stem != "__init__"
    }
    edges = {a: {b for b in graph if any(n == b or n.startswith(f"{b}.") for n in names)} for a, names in graph.items()}
    done: set[str] = set()
    while ready := {module for module in edges.keys() - done if edges[module] <= done}:
        done |= ready
    assert edges.keys() - done == set()


def _eager(module: ast.Module) -> list[ast.stmt]:
    return [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]


def _output(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_types_check() -> None:
    pytest.importorskip("mypy")
    assert _output("mypy") == ""


@pytest.mark.slow
def test_style_checks() -> None:
    pytest.importorskip("ruff")
    assert _output("ruff", "check", "megaseq", "tests", "benchmarks") == ""


# ---- the checks catch what they should -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "text", "caught"),
    [
        ("base", "import torch\nfrom megaseq.layers.norm import RMSNorm", True),
        ("layers", "from megaseq import tasks", True),
        ("layers", "import megaseq.learner", True),
        ("layers", "def f():\n    from megaseq.train import trainer", True),
        ("layers", "from megaseq.parallel.mesh import Mesh", True),
        ("layers", "from megaseq.parallel.spec import ParameterSpec", False),
        ("layers", "from megaseq.layers.norm import RMSNorm\nfrom megaseq import base", False),
        ("decode", "from megaseq.layers import Layer", True),
        ("train", "import wandb", True),
        ("cli", "from megaseq.train.trainer import Trainer", False),
    ],
)
def test_a_wrong_arrow_is_caught(package: str, text: str, caught: bool) -> None:
    assert bool(import_problems(ast.parse(text), package=package)) is caught


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("pickle.load(f)", True),
        ("pickle.loads(b)", True),
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
        ("json.load(f)", False),
    ],
)
def test_unpickling_is_caught(text: str, caught: bool) -> None:
    assert bool(unpickling(ast.parse(text))) is caught


def test_a_long_function_is_caught() -> None:
    assert long_functions(ast.parse("def f():\n" + "    x = 1\n" * 99)) == []
    assert len(long_functions(ast.parse("def f():\n" + "    x = 1\n" * 100))) == 1


def test_too_many_arguments_are_caught() -> None:
    assert argument_problems(ast.parse("def f(a, b): ...\nclass A:\n    def g(self, a, *, b, c): ...")) == []
    assert len(argument_problems(ast.parse("def f(a, b, c): ..."))) == 1
    assert len(argument_problems(ast.parse("def f(*, a, b, c, d, e, f, g, h, i): ..."))) == 1
    assert argument_problems(ast.parse("@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...")) == []
