"""YAML 1.2 as plain nodes with file and line; what a scalar means is decided later, by the type of the param."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from megaseq.base.errors import AsText, ParamsError, must


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """One value as written."""

    text: str
    plain: bool
    """Not quoted, and no block scalar: it may mean something else than a str."""
    where: str
    """`file:line`, for errors."""
    origin: str
    """Who set it, for `Params.origin`."""
    remove: bool = False
    """It carries the tag `!remove`."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A list of nodes."""

    items: tuple[Node, ...]
    where: str
    origin: str


@dataclass(kw_only=True)
class Map:
    """Keys in file order."""

    entries: dict[str, Node]
    where: str
    origin: str


Node = Scalar | Sequence | Map

_CORE = "tag:yaml.org,2002:"
# What the resolver gives to untagged nodes; nothing of it is constructed here.
_TAGS = frozenset(("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value"))
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def natural(text: str) -> bool | int | float | str | None:
    """Returns what a plain scalar means by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF.fullmatch(text):
        return float("-inf") if text[0] == "-" else float("inf")
    return float("nan") if _NAN.fullmatch(text) else text


def load(content: str, *, filename: str, origin: str = "") -> Node | None:
    """Reads one YAML document; None when it is empty.

    Args:
        content: The text.
        filename: For errors and origins; empty on the command line, where only `origin` counts.
        origin: Who sets the values; file and line of each when empty.

    Raises:
        ParamsError: It is no YAML, or a key occurs twice in a map (both lines are named).
    """
    loader = YAML(typ="safe", pure=True)
    loader.version = (1, 2)
    loader.allow_duplicate_keys = True  # reported below, with both lines
    try:
        root = loader.compose(content)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        reason = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise must(f"{filename}:{line}", "be YAML", AsText(f"not: {reason}"), "Mend the line") from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise must(filename, "be YAML", AsText(f"not: {' '.join(str(error).split())}"), "Mend the file") from None
    return None if root is None else _convert(root, filename=filename, origin=origin, above=())


def _convert(node: Any, *, filename: str, origin: str, above: tuple[int, ...]) -> Node:
    where = f"{filename}:{node.start_mark.line + 1}" if filename else ""
    marks = {"where": where, "origin": origin or where}
    if id(node) in above:
        raise must(where, "be a tree", AsText("an alias of what contains it"), "Write it out")
    above = (*above, id(node))
    tag = str(node.tag)
    if tag != "!remove" and not (tag.startswith(_CORE) and tag.removeprefix(_CORE) in _TAGS):
        raise must(where, "have no tag but !remove", AsText(tag.replace(_CORE, "!!")), "Take the tag away")
    if isinstance(node, ScalarNode):
        plain = node.style is None or node.style == ""
        return Scalar(text=node.value, plain=plain, remove=tag == "!remove", **marks)
    if isinstance(node, SequenceNode):
        items = tuple(_convert(item, filename=filename, origin=origin, above=above) for item in node.value)
        return Sequence(items=items, **marks)
    if not isinstance(node, MappingNode):
        raise must(where, "be a scalar, a list or a map", AsText(type(node).__name__))
    entries: dict[str, Node] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise must(f"{filename}:{line}", "have scalars as keys", AsText("a list or a map"))
        if key.value in entries:
            raise ParamsError(
                f"{filename}:{line}: {key.value}: must occur once in its map, but is also in line {lines[key.value]}. "
                "Remove one of the two."
            )
        lines[key.value] = line
        below = _convert(value, filename=filename, origin=origin, above=above)
        entries[key.value] = _at(below, f"{filename}:{line}") if filename else below
    return Map(entries=entries, **marks)


def _at(node: Node, where: str) -> Node:
    # The line of the key is the one to name: a block below it begins a line later.
    if not isinstance(node, Scalar):
        origin = where if node.origin == node.where else node.origin
        node = dataclasses.replace(node, where=where, origin=origin)
    return node
