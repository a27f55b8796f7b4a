"""Writes params as text, as YAML and as a list of differences; reads the text back."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from megaseq.base import access, configurable, nodes, overlay, paths
from megaseq.base.container import ParamsDict
from megaseq.base.errors import AsText, ParamsError, must
from megaseq.base.fields import hints_of
from megaseq.base.nodes import Map, Node, Scalar
from megaseq.base.params import ParamsBase, is_expanded, same
from megaseq.base.source import display_path
from megaseq.base.typecheck import members
from megaseq.base.unset import Unset

ParamsT = TypeVar("ParamsT", bound=ParamsBase)

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./\-]*")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_]+")
# Safe in YAML 1.2, but other readers take them for booleans.
_MISREAD = frozenset(("y", "n", "yes", "no", "on", "off", "required", "from_parent", "inf", "nan"))


def to_text(params: ParamsBase, *, origins: bool) -> str:
    """Returns `path : value` lines; see `ParamsBase.to_text`."""
    lines = []
    for path, value in lines_of(params):
        origin = _origin(params, path=path) if origins else ""
        lines.append(f"{path} : {value}{f'  # {origin}' if origin else ''}\n")
    return "".join(lines)


def lines_of(params: ParamsBase) -> Iterator[tuple[str, str]]:
    """Yields (path, value as text) of each class and leaf, in the order of declaration."""
    yield "cls", configurable.class_name(params.cls)
    for name, value in params._values.items():
        yield from _lines(value, path=name)


def _lines(value: Any, *, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, ParamsBase):
        for below, text in lines_of(value):
            yield paths.concat(path, below), text
    elif is_expanded(value):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _lines(item, path=paths.join(path, str(key)))
    else:
        yield path, flow(value)


def flow(value: Any) -> str:
    """Writes a value without params on one line, as JSON with the floats, names and unset values of YAML."""
    if isinstance(value, str):
        return paths.quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{paths.quoted(key)}: {flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, enum.Enum):
        return value.name
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return repr(value)


def _origin(params: ParamsBase, *, path: str) -> str:
    return access.history(params, keys=paths.split(path))[-1].origin if path != "cls" else ""


def from_text(content: str, *, kind: type[ParamsT], filename: str) -> ParamsT:
    """Builds params of class `kind` or below from text; see `ParamsBase.from_text`."""
    shown_name = display_path(filename)
    root = Map(entries={}, where=f"{shown_name}:1", origin=f"{shown_name}:1")
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            _add_line(root, line=line.rstrip("\r"), where=f"{shown_name}:{number}")
    if "cls" not in root.entries and "cls" in kind.__dict__ and kind.cls is not configurable.Configurable:
        start: ParamsBase | None = kind()
    else:
        start = None
    built = overlay._over_params(start, root, hint=ParamsBase, path="", replace=True)
    if not isinstance(built, kind) and not issubclass(built.cls, kind.cls):
        raise must(f"{shown_name}:1: cls", f"be a {kind.cls.__name__}", AsText(built.cls.__name__))
    return built  # type: ignore[return-value]


def _add_line(root: Map, *, line: str, where: str) -> None:
    keys, end = paths.scan(line)
    separator = re.compile(r"\s*:(?=\s|$)\s*").match(line, end)
    if not keys or separator is None:
        raise must(where, "be of the form `path : value`", line, "Mend the line")
    value, comment = _split_comment(line[separator.end() :])
    node = _value_node(value, where=where, origin=comment or where)
    above = root
    for key in keys[:-1]:
        below = above.entries.setdefault(key, Map(entries={}, where=where, origin=where))
        if not isinstance(below, Map):
            raise must(where, f"not lie below the value of {key}", line, "Remove one of the two lines")
        above = below
    if keys[-1] in above.entries:
        first = above.entries[keys[-1]].where.rpartition(":")[2]
        raise must(where, "set each path once", AsText(f"a second value, after line {first}"), "Remove one of the two")
    above.entries[keys[-1]] = node
    if keys[-1] == "cls":
        above.where, above.origin = where, node.origin


def _split_comment(text: str) -> tuple[str, str]:
    at = 0
    string = re.compile(r'"(?:[^"\\]|\\.)*"')
    while at < len(text):
        if text[at] == '"' and (match := string.match(text, at)):
            at = match.end()
        elif text[at] == "#" and (at == 0 or text[at - 1].isspace()):
            return text[:at].strip(), text[at + 1 :].strip()
        else:
            at += 1
    return text.strip(), ""


def _value_node(text: str, *, where: str, origin: str) -> Node:
    if re.fullmatch(r"[A-Za-z0-9_.+\-<>]+", text):
        return Scalar(text=text, plain=True, where=where, origin=origin)
    filename, _, _ = where.rpartition(":")
    try:
        node = nodes.load(text, filename=filename, origin=origin)
    except ParamsError as error:
        raise must(where, "have a YAML value", AsText(text), str(error)) from None
    return node if node is not None else Scalar(text="", plain=True, where=where, origin=origin)


def diff(mine: ParamsBase, *, other: ParamsBase) -> list[str]:
    """Returns the lines that differ; see `ParamsBase.diff`."""
    left, right = dict(lines_of(mine)), dict(lines_of(other))
    found: list[str] = []
    for path, value in left.items():
        if path not in right:
            found.append(f"- {path} : {value}")
        elif right[path] != value:
            found.append(f"{path} : {value} -> {right[path]}")
    found.extend(f"+ {path} : {value}" for path, value in right.items() if path not in left)
    return found


def to_yaml(params: ParamsBase, *, changed_only: bool, base: ParamsBase | None, origins: bool) -> str:
    """Returns YAML; see `ParamsBase.to_yaml`."""
    under = base if base is not None else type(params)()
    writer = _Yaml(full=not changed_only, root=params if origins else None)
    lines = writer.params(params, under=under, path="", forced=False) or []
    if not lines or not lines[0].startswith("cls: "):
        lines = [f"cls: {configurable.class_name(params.cls)}", *lines]
    return "\n".join(lines) + "\n"


_NOTHING = object()


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else paths.quoted(key)


class _Yaml:
    """Writes blocks of YAML: of everything, or of what differs from `under`."""

    def __init__(self, *, full: bool, root: ParamsBase | None) -> None:
        self.full = full
        self.root = root

    def params(self, value: ParamsBase, *, under: Any, path: str, forced: bool) -> list[str] | None:
        """Returns the lines of params; None when nothing differs and nothing is forced."""
        is_swap = type(under) is not type(value)
        always = self.full or forced
        lines = [f"cls: {configurable.class_name(value.cls)}"] if is_swap or always else []
        # When the class changes, the reader keeps values of the old one: each common name must be written.
        common = set(under._values) if is_swap and isinstance(under, ParamsBase) else set()
        start = type(value)() if is_swap else under
        hints = hints_of(type(value))
        for name, item in value._values.items():
            lines.extend(
                self.entry(
                    name,
                    item,
                    under=start._values[name],
                    hint=hints[name],
                    path=paths.join(path, name),
                    forced=forced or name in common,
                )
            )
        return lines or None

    def entry(self, key: str, value: Any, *, under: Any, hint: Any, path: str, forced: bool) -> list[str]:
        """Returns the lines of `key: value`; none when it does not differ."""
        block = self.block(value, under=under, hint=hint, path=path, forced=forced)
        if block is None:
            return []
        if isinstance(block, str):
            comment = f"  # {_origin(self.root, path=path)}" if self.root is not None else ""
            return [f"{_key(key)}: {block}{comment}"]
        return [f"{_key(key)}:", *(f"  {line}" for line in block)]

    def block(self, value: Any, *, under: Any, hint: Any, path: str, forced: bool) -> str | list[str] | None:
        """Returns a value for one line, or a block of lines, or None when it does not differ."""
        always = self.full or forced
        if isinstance(value, ParamsBase):
            return self.params(value, under=under, path=path, forced=forced)
        if isinstance(value, ParamsDict):
            lines: list[str] = []
            before = under if isinstance(under, dict) else {}
            for key, item in value.items():
                at = paths.join(path, key)
                start = before[key] if key in before else value._owner.default_item(value._key, key)
                start = _NOTHING if start is None and key not in before else start
                found = self.entry(key, item, under=start, hint=value._item_hint, path=at, forced=forced)
                # Equal to what the reader makes for a missing key: to name the key is enough.
                lines.extend(found or ([] if key in before else [f"{_key(key)}: {{}}"]))
            gone = [key for key in before if key not in value]
            lines.extend(f"{_key(key)}: !remove" for key in gone)
            return lines or ("{}" if always or not isinstance(under, dict) else None)
        if not always and same(value, under):
            return None
        if isinstance(value, tuple) and value and any(isinstance(item, ParamsBase | dict | tuple) for item in value):
            return self.sequence(value, hint=hint, path=path)
        return self.scalar(value, hint=hint)

    def sequence(self, value: tuple[Any, ...], *, hint: Any, path: str) -> list[str]:
        """Returns the block of a tuple that holds params or containers."""
        lines: list[str] = []
        for at, item in enumerate(value):
            block = self.block(item, under=_NOTHING, hint=hint, path=paths.join(path, str(at)), forced=False)
            first, *rest = [block] if isinstance(block, str) else block or ["{}"]
            lines.extend([f"- {first}", *(f"  {line}" for line in rest)])
        return lines

    def scalar(self, value: Any, *, hint: Any) -> str:
        """Writes a leaf; a str without quotes where no reader can take it for something else."""
        if isinstance(value, str) and not isinstance(value, enum.Enum):
            has_enum = any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in members(hint))
            safe = _PLAIN.fullmatch(value) and isinstance(nodes.natural(value), str) and value.lower() not in _MISREAD
            return value if safe and not has_enum else paths.quoted(value)
        return flow(value)


__all__ = ["Unset", "diff", "flow", "from_text", "lines_of", "to_text", "to_yaml"]
