"""Lays nodes (YAML, text, the command line) over params; the type of each param decides what a scalar means."""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterable
from typing import Any

from megaseq.base import access, nodes, paths, swap
from megaseq.base.container import ParamsDict
from megaseq.base.errors import AsText, ParamsError, UnknownParamError, must
from megaseq.base.fields import ParamsMeta, fields_of, hints_of
from megaseq.base.nodes import Map, Node, Scalar, Sequence
from megaseq.base.params import ParamsBase, same
from megaseq.base.source import display_path
from megaseq.base.typecheck import coerce, matches, members, wrong_type
from megaseq.base.unset import FROM_PARENT, REMOVE, REQUIRED

_UNSET = {"REQUIRED": REQUIRED, "FROM_PARENT": FROM_PARENT}


class LocatedError(ParamsError):
    """An error whose text already begins with file and line."""


def apply_yaml(params: ParamsBase, *, content: str, filename: str) -> None:
    """Lays YAML over `params`, in place.

    Raises:
        ParamsError: All that does not fit, one a line, each with file and line.
    """
    node = nodes.load(content, filename=display_path(filename))
    if node is None:
        return
    root = _need_map(node)
    if "cls" in root.entries:
        cls_node = root.entries["cls"]
        if swap.class_at(_text_of(cls_node), path="cls").Params is not type(params):
            raise located(
                must("cls", "stay as it is at the root", AsText(_text_of(cls_node)), f"It is {params.cls.__name__}"),
                where=cls_node.where,
            )
    lay(params, root, replace=False)


def params_from_yaml(content: str, *, base: ParamsBase | None = None, filename: str = "yaml") -> Any:
    """Builds params from YAML; see `ParamsBase.to_yaml`.

    Args:
        content: YAML with `cls:` at its top, unless there is a `base`.
        base: What the YAML is laid over; it stays as it is.
        filename: For errors and origins.

    Raises:
        ParamsError: All that does not fit, one a line, each with file and line.
    """
    node = nodes.load(content, filename=display_path(filename))
    if node is None and base is not None:
        return base.copy()
    if node is None:
        raise must(display_path(filename), "name a class with cls:", AsText("empty"), "Write cls: package.module.Class")
    start = base.copy() if base is not None else None
    return _over_params(start, _need_map(node), hint=ParamsBase, path="", replace=False)


def apply_overrides(params: ParamsBase, *, assignments: Iterable[str], origin: str = "command line") -> None:
    """Applies `path=value` assignments in order.

    Raises:
        ParamsError: All that does not fit, one a line.
    """
    problems: list[str] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        try:
            if not equals:
                raise must(assignment, "be written path=value", AsText("without ="), "Write path=value")
            params.set_text(path.strip(), text, origin=origin)
        except ParamsError as error:
            problems.append(str(error))
    if problems:
        raise ParamsError("\n".join(problems))


def reader(text: str, *, origin: str) -> access.MakeValue:
    """Returns what makes a value of `text`, once the type of the param is known."""

    def _make(hint: Any, path: str, current: Any) -> Any:
        if hint is type:
            return text.strip()
        node = _node_of(text, hint=hint, path=path, origin=origin)
        return REMOVE if _is_remove(node) else _over(current, node, hint=hint, path=path, replace=False)

    return _make


def _node_of(text: str, *, hint: Any, path: str, origin: str) -> Node:
    stripped = text.strip()
    has_items = any(isinstance(m, ParamsMeta) or typing.get_origin(m) in (tuple, dict) for m in members(hint))
    if (has_items and stripped) or stripped.startswith(('"', "'", "!remove")):
        try:
            node = nodes.load(stripped, filename="", origin=origin)
        except ParamsError:
            if has_items:
                raise must(path, "be YAML such as [1, 2] or {a: 1}", AsText(text), "Quote it for the shell") from None
            node = None
        if node is not None and (has_items or isinstance(node, Scalar)):
            return node
    # Taken whole: a pattern like `.*bias$` or a text with a colon is no YAML, but is what the person means.
    return Scalar(text=stripped if stripped else text, plain=bool(stripped), where="", origin=origin)


def located(error: ParamsError, *, where: str) -> ParamsError:
    """Puts file and line before each line of an error that has none yet; `where` is empty on the command line."""
    if isinstance(error, LocatedError) or not where:
        return error
    return LocatedError("\n".join(f"{where}: {line}" for line in str(error).split("\n")))


def lay(params: ParamsBase, node: Map, *, replace: bool) -> None:
    """Writes every entry of `node` but `cls` into `params`.

    Args:
        params: Changed in place.
        node: Values by name.
        replace: Dicts lose the items that `node` does not name, as when the node is a full text.
    """
    problems: list[str] = []
    fields, hints = fields_of(type(params)), hints_of(type(params))
    # Dicts last: an item that is missing starts as a copy of a template, which this very node may change.
    order = sorted(node.entries, key=lambda name: name in fields and isinstance(params._values[name], dict))
    for name in order:
        if name == "cls":
            continue
        entry = node.entries[name]
        try:
            if name not in fields:
                raise params._unknown(name)
            current = params._values[name]
            path = paths.join(params.params_path, name)
            new = _over(current, entry, hint=hints[name], path=path, replace=replace)
            if replace:
                _restore(params, name, new, entry=entry)
            elif new is not current or not isinstance(new, ParamsBase | dict):
                params._write(name, new, origin=entry.origin)
        except ParamsError as error:
            problems.append(str(located(error, where=entry.where)))
    if problems:
        raise (LocatedError if node.where else ParamsError)("\n".join(problems))


def _restore(params: ParamsBase, name: str, new: Any, *, entry: Node) -> None:
    """Writes what a full text says, with the origins in it; a default that the text took from the class stays one."""
    current = params._values[name]
    known = access.history(params, keys=[name])[-1].origin
    if new is current or (same(new, current) and not isinstance(entry, Map)):
        if entry.origin != known:
            params._note(name, current, origin=entry.origin)
        return
    params._write(name, new, origin=entry.origin)
    if not isinstance(new, ParamsBase):
        _note_items(params, name, entry)


def _note_items(params: ParamsBase, key: str, entry: Node) -> None:
    if not isinstance(entry, Map):
        return
    for item, below in entry.entries.items():
        at = paths.join(key, item)
        params._note(at, access.get(params, keys=paths.split(at)), origin=below.origin)
        if isinstance(below, Map) and "cls" not in below.entries:
            _note_items(params, at, below)


def _over(current: Any, node: Node, *, hint: Any, path: str, replace: bool) -> Any:
    """Returns what stands at `path` once `node` is laid over `current`: `current` itself, if it changed in place."""
    try:
        if isinstance(node, Scalar):
            return scalar_value(node, hint=hint, path=path)
        if isinstance(node, Sequence):
            return _over_tuple(node, hint=hint, path=path, replace=replace)
        kinds = members(hint)
        has_dict = any(typing.get_origin(kind) is dict for kind in kinds)
        # A dict may have an item called cls; it is a class where the type allows params.
        is_params = isinstance(node.entries.get("cls"), Scalar) and any(isinstance(kind, ParamsMeta) for kind in kinds)
        if isinstance(current, ParamsDict) and not replace and not is_params:
            return _over_dict(current, node, path=path)
        if has_dict and not isinstance(current, ParamsBase) and not is_params:
            item_hint = next(typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict)
            return {
                key: _over(None, item, hint=item_hint, path=paths.join(path, key), replace=replace)
                for key, item in node.entries.items()
                if not _is_remove(item)
            }
        if any(typing.get_origin(kind) is tuple for kind in kinds) and all(key.isdecimal() for key in node.entries):
            return _over_items(current, node, hint=hint, path=path, replace=replace)
        if any(isinstance(kind, ParamsMeta) for kind in kinds):
            return _over_params(current, node, hint=hint, path=path, replace=replace)
        raise wrong_type(node_value(node), hint=hint, path=path)
    except ParamsError as error:
        raise located(error, where=node.where) from None


def _over_dict(current: ParamsDict, node: Map, *, path: str) -> ParamsDict:
    for key, entry in node.entries.items():
        if _is_remove(entry):
            current.put(key, REMOVE, origin=entry.origin)
            continue
        old = current.get(key)
        start = old
        if key not in current and isinstance(entry, Map) and current._owner.default_item(current._key, key) is not None:
            start = current.item(key)
        new = _over(start, entry, hint=current._item_hint, path=paths.join(path, key), replace=False)
        if new is not old or not isinstance(new, ParamsBase | dict):
            current.put(key, new, origin=entry.origin)
    return current


def _over_items(current: Any, node: Map, *, hint: Any, path: str, replace: bool) -> tuple[Any, ...]:
    """A tuple by index: in a full text all items, in an overlay those to be changed."""
    start: tuple[Any, ...] = current if isinstance(current, tuple) and not replace else ()
    items = list(start)
    for key, entry in sorted(node.entries.items(), key=lambda pair: int(pair[0])):
        at = int(key)
        below = len(items) + 1 if replace else len(items)
        if at >= below:
            raise must(paths.join(path, key), f"be an index below {below}", at, "Write the whole list")
        old = items[at] if at < len(items) else None
        new = _over(old, entry, hint=_item_hints(hint, length=at + 1)[at], path=paths.join(path, key), replace=replace)
        items[at : at + 1] = [new]
    return tuple(items)


def _over_tuple(node: Sequence, *, hint: Any, path: str, replace: bool) -> tuple[Any, ...]:
    kinds = [kind for kind in members(hint) if typing.get_origin(kind) is tuple]
    if not kinds:
        raise wrong_type(node_value(node), hint=hint, path=path)
    problem: ParamsError | None = None
    for kind in kinds:
        try:
            hints = _item_hints(kind, length=len(node.items))
            return tuple(
                _over(None, item, hint=hints[at], path=paths.join(path, str(at)), replace=replace)
                for at, item in enumerate(node.items)
            )
        except ParamsError as error:
            problem = error
        except IndexError:
            problem = wrong_type(node_value(node), hint=hint, path=path)
    raise problem or wrong_type(node_value(node), hint=hint, path=path)


def _item_hints(hint: Any, *, length: int) -> list[Any]:
    for kind in members(hint):
        if typing.get_origin(kind) is tuple:
            args = typing.get_args(kind)
            return [args[0]] * length if len(args) == 2 and args[1] is Ellipsis else list(args)
    return []


def _over_params(current: Any, node: Map, *, hint: Any, path: str, replace: bool) -> ParamsBase:
    cls_path = paths.join(path, "cls")
    target = None
    if "cls" in node.entries:
        try:
            target = swap.class_at(_text_of(node.entries["cls"]), path=cls_path)
        except ParamsError as error:
            raise located(error, where=node.entries["cls"].where) from None
    if isinstance(current, ParamsBase):
        new = swap.swapped(current, to=target) if target and target.Params is not type(current) else current
    else:
        kinds = [kind for kind in members(hint) if isinstance(kind, ParamsMeta)]
        if target is None:
            if len(kinds) != 1 or kinds[0] is ParamsBase:
                raise must(cls_path, "be given here", AsText("missing"), "Write cls: package.module.Class")
            new = kinds[0]()
        else:
            new = target.Params()
        new._place = path
    if new is not current and hint is not ParamsBase:
        coerce(new, hint=hint, path=path)
    lay(new, node, replace=replace)
    return new


def scalar_value(node: Scalar, *, hint: Any, path: str) -> Any:
    """Returns the value of a scalar for a param of type `hint`.

    A str keeps its text, `no` and `1e-4` too; only `null` must be quoted to be text.

    Raises:
        ParamsError: No reading of it is of the type.
    """
    if node.remove:
        raise must(path, "be a value", AsText("!remove"), "Only an item of a dict can be removed")
    kinds = members(hint)
    if node.plain and node.text in _UNSET:
        return _UNSET[node.text]
    value = nodes.natural(node.text) if node.plain else node.text
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    if node.plain:
        for kind in enums:
            if node.text in kind.__members__:
                return kind[node.text]
    for kind in kinds:
        if matches(value, kind):
            return value
    if float in kinds:
        if type(value) is int:
            return coerce(value, hint=float, path=path)
        if node.plain and node.text.lower() in ("inf", "+inf", "-inf", "nan"):
            return float(node.text)
    if node.plain and value is not None:
        for kind in kinds:
            if matches(node.text, kind):
                return node.text
    for kind in enums:
        if node.text in kind.__members__:
            return kind[node.text]
    raise wrong_type(value, hint=hint, path=path)


def node_value(node: Node) -> Any:
    """Returns the node as plain Python, for an error."""
    if isinstance(node, Scalar):
        return nodes.natural(node.text) if node.plain else node.text
    if isinstance(node, Sequence):
        return [node_value(item) for item in node.items]
    return {key: node_value(item) for key, item in node.entries.items()}


def _is_remove(node: Node) -> bool:
    return isinstance(node, Scalar) and node.remove


def _need_map(node: Node) -> Map:
    if not isinstance(node, Map):
        raise must(node.where, "be a map of param names", node_value(node), "Write name: value")
    return node


def _text_of(node: Node) -> str:
    if not isinstance(node, Scalar):
        raise must(node.where, "be the name of a class", node_value(node), "Write module and class")
    return node.text


__all__ = ["UnknownParamError", "apply_overrides", "apply_yaml", "lay", "params_from_yaml", "reader"]
