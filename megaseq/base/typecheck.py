"""Checks a value against the type of a param, and brings it into the form in which it is stored."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

from megaseq.base import paths
from megaseq.base.errors import AsText, ParamsError, must, shown, suggestion
from megaseq.base.fields import ParamsMeta, type_text
from megaseq.base.nodes import natural
from megaseq.base.unset import REMOVE, Unset


class Mapping(dict[str, Any]):
    """A checked dict on its way into params, with the type of its items."""

    item_hint: Any = Any


def coerce(value: Any, *, hint: Any, path: str) -> Any:
    """Returns `value` in stored form: int becomes float where the type says float, a list becomes a tuple.

    Args:
        value: What is written; never changed.
        hint: The resolved type of the param.
        path: Full path of the param, for the error.

    Raises:
        ParamsError: The value is not of the type.
    """
    if isinstance(value, Unset) and value is not REMOVE:
        return value
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        return _coerce_union(value, hint=hint, path=path)
    if origin is tuple and isinstance(value, tuple | list):
        return _coerce_tuple(value, hint=hint, path=path)
    if origin is dict and isinstance(value, dict):
        item_hint = typing.get_args(hint)[1]
        items = Mapping()
        items.item_hint = item_hint
        for key, item in value.items():
            if not isinstance(key, str):
                raise must(path, "have keys of type str", key, f"Write {shown(str(key))}")
            _check_text(key, path=path)
            items[key] = coerce(item, hint=item_hint, path=paths.join(path, key))
        return items
    if isinstance(hint, ParamsMeta):
        if isinstance(value, hint) or _is_params_of(value, hint):
            return value
    elif hint is float and type(value) is int:
        if abs(value) <= 2**53:
            return float(value)
    elif matches(value, hint):
        if isinstance(value, str):
            _check_text(value, path=path)
        return value
    raise wrong_type(value, hint=hint, path=path)


def matches(value: Any, hint: Any) -> bool:
    """Whether a leaf `value` is of the type `hint` as it is, without conversion."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint in (bool, int, float, str):
        return type(value) is hint
    return isinstance(hint, type) and issubclass(hint, enum.Enum) and isinstance(value, hint)


def _is_params_of(value: Any, hint: ParamsMeta) -> bool:
    owner = getattr(hint, "cls", None)
    bound = getattr(type(value), "cls", None) if isinstance(type(value), ParamsMeta) else None
    return owner is not None and bound is not None and issubclass(bound, owner)


def _coerce_union(value: Any, *, hint: Any, path: str) -> Any:
    members = typing.get_args(hint)
    # A member that takes the value as it is goes before one that converts: 3 stays an int in `float | int`.
    for member in members:
        if matches(value, member):
            return coerce(value, hint=member, path=path)
    problem: ParamsError | None = None
    for member in members:
        try:
            return coerce(value, hint=member, path=path)
        except ParamsError as error:
            # Of several refusals the one about an inner item tells more than the outer "must be A or B".
            if not str(error).startswith(f"{path}: "):
                problem = error
    raise problem or wrong_type(value, hint=hint, path=path)


def _coerce_tuple(value: Any, *, hint: Any, path: str) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        item_hints = [args[0]] * len(value)
    else:
        item_hints = [] if args == ((),) else list(args)
        if len(item_hints) != len(value):
            raise must(path, f"have {len(item_hints)} items", AsText(f"of {len(value)}: {shown(value)}"))
    return tuple(
        coerce(item, hint=item_hint, path=paths.join(path, str(index)))
        for index, (item, item_hint) in enumerate(zip(value, item_hints, strict=True))
    )


def _check_text(value: str, *, path: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise must(path, "be text that UTF-8 can write", value, "Remove the lone surrogate") from None


def wrong_type(value: Any, *, hint: Any, path: str) -> ParamsError:
    """Returns the error that says which type `path` must have, and what `value` is."""
    kind = type(value)
    found = f"{shown(value)} ({kind.__name__})"
    remedy = ""
    if isinstance(kind, ParamsMeta):
        found = f"{type_text(kind)}"
    elif isinstance(value, str) and typing.get_origin(hint) is typing.Literal:
        found = shown(value)
        hinted = suggestion(value, [choice for choice in typing.get_args(hint) if isinstance(choice, str)])
        remedy = hinted[0].upper() + hinted[1:] if hinted.endswith("?") else ""
    elif isinstance(value, type) and isinstance(getattr(value, "Params", None), ParamsMeta):
        remedy = f"Write {value.__name__}.Params()"
    elif hint is float and kind is int:
        remedy = "A float cannot hold it exactly"
    elif hint is int and kind is float and value.is_integer():
        remedy = f"Write {int(value)}"
    rule = type_text(hint)
    article = "" if rule.startswith(("one of", "a ", "None")) else "an " if rule[0] in "aeiou" else "a "
    return must(path, f"be {article}{rule}", AsText(found), remedy)


def members(hint: Any) -> list[Any]:
    """Returns the alternatives of a union, or the type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in members(member)]
    return [hint]


def check_hint(hint: Any, *, path: str) -> None:
    """Refuses types that params cannot hold.

    Raises:
        ParamsError: `hint` is not built of int, float, bool, str, None, Literal, Enum, unions, tuple, dict, Params.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        for name in hint.__members__:
            if name in ("REQUIRED", "FROM_PARENT") or not isinstance(natural(name), str):
                rule = "be an Enum whose names YAML reads as text"
                raise must(path, rule, AsText(f"{hint.__qualname__} with {name}"), "Rename the member")
    if origin in (typing.Union, types.UnionType):
        inner = list(args)
    elif origin is tuple:
        inner = [arg for arg in args if arg is not Ellipsis and arg != ()]
    elif origin is dict and len(args) == 2 and args[0] is str:
        inner = [args[1]]
    elif (
        origin is typing.Literal
        or hint in (bool, int, float, str, None, type(None))
        or isinstance(hint, ParamsMeta)
        or (isinstance(hint, type) and issubclass(hint, enum.Enum))
    ):
        inner = []
    else:
        kinds = "bool, int, float, str, None, Literal, Enum, unions, tuple[T, ...], dict[str, T] and Params"
        raise must(path, f"have a type made of {kinds}", AsText(type_text(hint)))
    for part in inner:
        check_hint(part, path=path)
