"""docs/parallelism.md has every param of `parallel` and every layout that the code refuses, in the code's own words."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from megaseq.base import Configurable
from megaseq.base.fields import doc_of, fields_of
from megaseq.base.params import ParamsBase
from megaseq.parallel.layout import Parallel
from megaseq.parallel.refusals import REFUSALS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table below a header line."""
    found: list[list[str]] = []
    lines = PAGE[PAGE.index(header) :].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def params(owner: ParamsBase, *, path: str) -> Iterator[tuple[str, str]]:
    """(path, meaning) of all params below `owner`."""
    for name in fields_of(type(owner)):
        value = owner.get(name)
        if isinstance(value, ParamsBase):
            yield from params(value, path=f"{path}.{name}")
        else:
            yield f"{path}.{name}", " ".join(doc_of(type(owner), name).split())


def test_every_param_is_there_with_its_meaning() -> None:
    shown = [(row[0].strip("`"), row[2]) for row in rows("| param | default | meaning |")]
    assert shown == list(params(Parallel.Params(), path="parallel"))


def test_every_refusal_of_the_table_is_there() -> None:
    assert rows("| combination | why |") == [[refusal.what, refusal.reason] for refusal in REFUSALS]


def texts(node: ast.expr | None, *, scope: ast.FunctionDef) -> list[str]:
    """What an expression of a function may be, with nothing for what only a running program knows."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        pieces = [texts(part, scope=scope) for part in node.values]
        return ["".join(chosen) for chosen in itertools.product(*pieces)]
    if isinstance(node, ast.FormattedValue):
        return texts(node.value, scope=scope)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [f"{a}{b}" for a in texts(node.left, scope=scope) for b in texts(node.right, scope=scope)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, scope=scope) + texts(node.orelse, scope=scope)
    if isinstance(node, ast.Name):
        return [text for value in assigned(node.id, scope=scope) for text in texts(value, scope=scope)] or [""]
    return [""]


def assigned(name: str, *, scope: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function gives a variable: by an assignment, or by a loop over values that are written there."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            pairs = [(node.target, item) for item in node.iter.elts]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from (v for t, v in zip(target.elts, value.elts, strict=True) if getattr(t, "id", "") == name)
            elif getattr(target, "id", "") == name:
                yield value


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name of the class around it and around its Params, function) of all functions in the package."""
    for file in sorted((ROOT / "megaseq").rglob("*.py")):
        waiting: list[tuple[str, ast.AST]] = [("", ast.parse(file.read_text(encoding="utf-8")))]
        while waiting:
            owner, node = waiting.pop()
            if isinstance(node, ast.ClassDef) and node.name != "Params":
                owner = node.name
            if isinstance(node, ast.FunctionDef):
                yield owner, node
            waiting += [(owner, child) for child in ast.iter_child_nodes(node)]


def raised() -> Iterator[tuple[str, str]]:
    """(path, rule) of every `must` about `parallel` in the package."""
    for _, function in functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "must":
                path, rule = (texts(argument, scope=function) for argument in node.args[:2])
                yield from itertools.product(path, rule)


def reported() -> Iterator[tuple[str, str]]:
    """(path, rule) of every problem that the validators of a run, of `parallel` and of what is below it yield."""
    places = {type(owner).cls.__name__: f"parallel.{path}." for path, owner in Parallel.Params().find(Configurable)}
    places |= {"Parallel": "parallel.", "Run": ""}
    for owner, function in functions():
        if function.name != "validate" or owner not in places:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Yield):
                found = texts(node.value, scope=function)
                for path, rule in (text.partition(", but ")[0].split(": must ") for text in found):
                    yield f"{places[owner]}{path}", rule


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text))


def test_every_refusal_made_elsewhere_is_there() -> None:
    shown = [(name.strip("` "), words_of(row[1])) for row in rows("| param | must |") for name in row[0].split(",")]
    made = {(path, rule) for path, rule in (*raised(), *reported()) if path.split(".")[0] == "parallel"}
    # One of each kind: under a path that is written out, in a variable, in a loop, by a validator, by another one's.
    paths = {path for path, _ in made}
    assert {"parallel", "parallel.zero.offload_parameters", "parallel.zero.offload_optimizer"} <= paths
    assert {"parallel.pipe", "parallel.pipeline.micro_batches", "parallel.sequence", "parallel.zero.stage"} <= paths
    missing = []
    for path, rule in sorted(made):
        words = words_of(rule)
        # The page says "a few minutes" where the code has a number: most of the words must be there. What of a path
        # only a running program knows may be anything.
        said = [there for name, there in shown if name == path or (path[-1] == "." and f"{name}.".startswith(path))]
        if words and not any(len(words & there) >= 0.7 * len(words) for there in said):
            missing.append((path, rule))
    assert missing == []
