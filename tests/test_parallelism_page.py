"""docs/parallelism.md has every param of `parallel` and every layout that the code refuses, in the code's own words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def raised() -> Iterator[tuple[str, list[str]]]:
    """(path, constant pieces of the rule) of every `must` about `parallel` in the package."""
    for file in sorted((ROOT / "megaseq").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "must"):
                continue
            path, rule = node.args[0], node.args[1]
            if not (isinstance(path, ast.Constant) and str(path.value).split(".")[0] == "parallel"):
                continue
            parts = rule.values if isinstance(rule, ast.JoinedStr) else [rule]
            yield str(path.value), [str(part.value) for part in parts if isinstance(part, ast.Constant)]


def test_every_refusal_made_elsewhere_is_there() -> None:
    shown = [(row[0].strip("`"), row[1]) for row in rows("| param | must |")]
    missing = []
    for path, pieces in raised():
        words = {word for piece in pieces for word in re.findall(r"[a-z0-9']+", piece)}
        said = [set(re.findall(r"[a-z0-9']+", rule)) for name, rule in shown if name == path]
        # The page says "a few minutes" where the code has a number: most of the words must be there.
        if words and not any(len(words & rule) >= 0.7 * len(words) for rule in said):
            missing.append((path, " ".join(pieces)))
    assert missing == []
