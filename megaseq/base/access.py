"""Reading and writing params by path."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from megaseq.base import paths
from megaseq.base.container import ParamsDict
from megaseq.base.errors import AsText, UnknownParamError, must, shown
from megaseq.base.fields import fields_of, hints_of, type_text
from megaseq.base.params import ParamsBase, Write, brief

MakeValue = Callable[[Any, str, Any], Any]
"""Given (type, full path, current value), returns the value to write there."""


def get(params: ParamsBase, *, keys: list[str]) -> Any:
    """Returns the value below `params` at `keys`."""
    node: Any = params
    path = params.params_path
    for key in keys:
        node = _step(node, key=key, path=path)
        path = paths.join(path, key)
    return node


def _step(node: Any, *, key: str, path: str) -> Any:
    if isinstance(node, ParamsBase):
        if key == "cls":
            return node.cls
        if key not in fields_of(type(node)):
            raise node._unknown(key)
        return node._values[key]
    if isinstance(node, ParamsDict):
        return node.item(key)
    if isinstance(node, tuple):
        return node[_index(node, key=key, path=path)]
    raise must(path, f"have params below it, such as {key}", AsText(f"{shown(node)} ({type(node).__name__})"))


def _index(items: tuple[Any, ...], *, key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        rule = f"be an index below {len(items)}" if items else "not be there: the tuple is empty"
        raise must(paths.join(path, key), rule, AsText(key))
    return int(key)


def owner_of(params: ParamsBase, *, keys: list[str]) -> tuple[ParamsBase, str]:
    """Returns the innermost params on the way and the name of its field that leads to the value."""
    owner, name = params, keys[0]
    node: Any = params
    path = params.params_path
    for key in keys:
        if isinstance(node, ParamsBase):
            owner, name = node, key
        node = _step(node, key=key, path=path)
        path = paths.join(path, key)
    return owner, name


def history(params: ParamsBase, *, keys: list[str]) -> list[Write]:
    """Returns the writes to the value at `keys`, the class default first."""
    if keys[-1] == "cls" and isinstance(get(params, keys=keys[:-1]), ParamsBase):
        keys = keys[:-1]
        if not keys:
            return [Write(f"class {params.cls.__qualname__}", params.cls.__name__)]
    owner, name = owner_of(params, keys=keys)
    field = fields_of(type(owner))[name]
    writes = [Write(field.origin, brief(field.default)), *owner._writes.get(name, ())]
    # The rest of the way lies in dicts and tuples of this field; each level may have been written by itself.
    below = keys[_position(params, keys=keys, owner=owner) + 1 :]
    key = name
    for part in below:
        key = paths.join(key, part)
        writes.extend(owner._writes.get(key, ()))
    return writes


def _position(params: ParamsBase, *, keys: list[str], owner: ParamsBase) -> int:
    node: Any = params
    found = 0
    path = params.params_path
    for at, key in enumerate(keys):
        if isinstance(node, ParamsBase):
            found = at
        node = _step(node, key=key, path=path)
        path = paths.join(path, key)
    return found


def put(params: ParamsBase, *, keys: list[str], value: MakeValue, origin: str) -> None:
    """Writes the value that `value` makes at `keys` below `params`; `*` stands for every item of a dict or tuple."""
    name, *rest = keys
    path = paths.join(params.params_path, name)
    if name == "cls" and not rest:
        from megaseq.base import swap

        swap.change_class(params, to=value(type, path, params.cls), origin=origin)
        return
    if name not in fields_of(type(params)):
        if name == "*":
            raise must(path, "stand for the items of a tuple or dict", AsText(f"below {params.cls.__name__}"))
        raise params._unknown(name)
    hint = hints_of(type(params))[name]
    current = params._values[name]
    if not rest:
        params._write(name, value(hint, path, current), origin=origin)
        return
    new = _below(current, keys=rest, hint=hint, path=path, value=value, origin=origin)
    if new is not current:
        params._write(name, new, origin=origin)


def _below(current: Any, *, keys: list[str], hint: Any, path: str, value: MakeValue, origin: str) -> Any:
    """Writes below `current`; returns what stands in its place now: itself unless it is a tuple or was None."""
    key, *rest = keys
    if isinstance(current, ParamsBase):
        put(current, keys=keys, value=value, origin=origin)
        return current
    if key == "*":
        if not isinstance(current, ParamsDict | tuple) or not current:
            raise must(path, "have items for the *", AsText(f"{shown(current)}"))
        each = list(current) if isinstance(current, ParamsDict) else [str(at) for at in range(len(current))]
        for one in each:
            current = _below(current, keys=[one, *rest], hint=hint, path=path, value=value, origin=origin)
        return current
    if isinstance(current, ParamsDict):
        _put_item(current, key=key, rest=rest, value=value, origin=origin)
        return current
    if isinstance(current, tuple):
        at = _index(current, key=key, path=path)
        item_hint, item_path = _item_hint(hint, at=at), paths.join(path, key)
        if rest:
            item = _below(current[at], keys=rest, hint=item_hint, path=item_path, value=value, origin=origin)
        else:
            item = value(item_hint, item_path, current[at])
        return current if item is current[at] else (*current[:at], item, *current[at + 1 :])
    if keys == ["cls"]:
        from megaseq.base import swap

        return swap.class_at(value(type, path, None), path=paths.join(path, "cls")).Params()
    found = AsText(f"{shown(current)} ({type(current).__name__})")
    classes = [kind for kind in typing.get_args(hint) if isinstance(kind, type) and issubclass(kind, ParamsBase)]
    if current is None and classes:
        owner = classes[0]().cls
        remedy = f"Set {path}.cls={owner.__module__}.{owner.__qualname__} first"
        raise must(path, f"have params below it, such as {key}", found, remedy)
    raise must(path, f"have params below it, such as {key}", found)


def _put_item(items: ParamsDict, *, key: str, rest: list[str], value: MakeValue, origin: str) -> None:
    path = paths.join(items.params_path, key)
    if not rest:
        items.put(key, value(items._item_hint, path, items.get(key)), origin=origin)
        return
    if key not in items and rest != ["cls"]:
        # Into the dict first: what is written below must know its full path.
        items.put(key, items.item(key), origin=origin)
    current = items.get(key)
    new = _below(current, keys=rest, hint=items._item_hint, path=path, value=value, origin=origin)
    if new is not current:
        items.put(key, new, origin=origin)


def _item_hint(hint: Any, *, at: int) -> Any:
    for member in (hint, *typing.get_args(hint)):
        if typing.get_origin(member) is tuple:
            args = typing.get_args(member)
            return args[0] if len(args) == 2 and args[1] is Ellipsis else args[at]
    raise must(type_text(hint), "be a tuple", hint)


__all__ = ["UnknownParamError", "get", "history", "owner_of", "put"]
