"""What a class of params consists of: its fields, their types and defaults, collected when the class is made."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from typing import Any, NamedTuple

from megaseq.base import source
from megaseq.base.errors import AsText, ParamsError, must, suggestion
from megaseq.base.unset import REQUIRED


class Field(NamedTuple):
    """One param of a class, as its body or that of a parent declares it."""

    name: str
    default: Any
    annotated_in: type
    """The class whose body has the annotation; names in it are looked up in that class's module."""
    default_in: type
    """The class whose body gives the default."""

    @property
    def origin(self) -> str:
        """`file:line` of the default."""
        return source.location(self.default_in, self.name)


class ParamsMeta(type):
    """Takes the fields out of the class body, so that instances hold their own values only."""

    if typing.TYPE_CHECKING:
        __params_fields__: dict[str, Field]
        __params_hints__: dict[str, Any] | None
        __params_scope__: dict[str, Any]

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> ParamsMeta:
        """Makes the class; `body` loses its fields.

        Raises:
            ParamsError: A field has no annotation, or the name of a method.
        """
        root = not any(isinstance(base, ParamsMeta) for base in bases)
        if root:
            cls = super().__new__(mcs, name, bases, body)
            cls.__params_fields__ = {}
            cls.__params_hints__ = {}
            cls.__params_scope__ = {}
            return cls
        # The annotations survive on the class; only the values go.
        probe = {key: body.pop(key) for key in list(body) if _is_value(key, body[key])}
        body.setdefault("__slots__", ())
        cls = super().__new__(mcs, name, bases, body)
        own = {key: text for key, text in inspect.get_annotations(cls).items() if not _is_class_var(text)}
        for key, value in list(probe.items()):
            if key not in own and _is_class_var(inspect.get_annotations(cls).get(key, "")):
                setattr(cls, key, value)
                del probe[key]
        cls.__params_fields__ = _collect(cls, own, probe)
        cls.__params_hints__ = None
        cls.__params_scope__ = _scope()
        return cls


def _is_value(key: str, value: Any) -> bool:
    dunder = key.startswith("__") and key.endswith("__")
    return not dunder and not isinstance(
        value, types.FunctionType | property | classmethod | staticmethod | type | types.MemberDescriptorType
    )


def _is_class_var(annotation: Any) -> bool:
    text = annotation if isinstance(annotation, str) else repr(annotation)
    return text.replace("typing.", "").startswith("ClassVar")


def _collect(cls: ParamsMeta, own: dict[str, Any], values: dict[str, Any]) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    # From the far end of the method resolution order: the nearer class decides, the first keeps the place.
    for base in reversed(cls.__mro__[1:]):
        if isinstance(base, ParamsMeta):
            for field in base.__params_fields__.values():
                if base in (field.annotated_in, field.default_in):
                    fields[field.name] = field
    for key in [*own, *(key for key in values if key not in own)]:
        if key in own:
            if hasattr(cls, key):
                raise must(
                    f"{cls.__qualname__}.{key}", "not have the name of a method of Params", key, "Choose another name"
                )
            fields[key] = Field(key, values.get(key, REQUIRED), cls, cls)
        elif key in fields:
            fields[key] = fields[key]._replace(default=values[key], default_in=cls)
        else:
            hint = suggestion(key, fields)
            raise must(
                f"{cls.__qualname__}.{key}",
                "have a type, as in `name: int = 1`, or be a param of a parent",
                AsText("neither"),
                hint[0].upper() + hint[1:] if fields else "Write its type",
            )
    return fields


def _scope() -> dict[str, Any]:
    # Names of classes that live in a function (tests, notebooks) are only visible in its frames, now.
    frame: types.FrameType | None = sys._getframe(2)
    scope: dict[str, Any] = {}
    if frame is None:
        return scope
    module = frame.f_globals
    frames: list[types.FrameType] = []
    while frame is not None and frame.f_globals is module:
        frames.append(frame)
        frame = frame.f_back
    for outer in reversed(frames):
        if outer.f_locals is not module:
            scope.update(outer.f_locals)
    return {"__globals__": module, **{k: v for k, v in scope.items() if isinstance(v, type | types.GenericAlias)}}


def fields_of(params_class: ParamsMeta) -> dict[str, Field]:
    """Returns the fields of a Params class by name, those of the furthest parent first."""
    return params_class.__params_fields__


def hints_of(params_class: ParamsMeta) -> dict[str, Any]:
    """Returns the resolved type of each field.

    Raises:
        ParamsError: A type names something that does not exist.
    """
    if params_class.__dict__["__params_hints__"] is None:
        hints: dict[str, Any] = {}
        for field in params_class.__params_fields__.values():
            hints[field.name] = _resolve(field)
        params_class.__params_hints__ = hints
    hints_now = params_class.__params_hints__
    assert hints_now is not None
    return hints_now


def _resolve(field: Field) -> Any:
    owner = field.annotated_in
    assert isinstance(owner, ParamsMeta)
    annotation = inspect.get_annotations(owner)[field.name]
    if not isinstance(annotation, str):
        return annotation
    scope = dict(owner.__params_scope__)
    names = scope.pop("__globals__", None) or vars(sys.modules[owner.__module__])
    try:
        # The text of an annotation in a class body that Python has already run: no foreign input.
        return eval(annotation, names, {**scope, **vars(owner)})
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ParamsError(
            f"{owner.__qualname__}.{field.name}: must have a type that exists at run time, "
            f"but is {annotation} ({error}). Import it outside of `if TYPE_CHECKING`."
        ) from error


def doc_of(params_class: ParamsMeta, name: str) -> str:
    """Returns the string literal after the field, of the nearest class that has one; empty when none has."""
    for base in params_class.__mro__:
        if isinstance(base, ParamsMeta):
            found = source.declarations(base).get(name)
            if found and found.doc:
                return found.doc
    return ""


def type_text(hint: Any) -> str:
    """Writes a type for a sentence: `int`, `a tuple of int`, `Norm.Params or None`."""
    from_hint = typing.get_origin(hint)
    if hint is None or hint is type(None):
        return "None"
    if from_hint is typing.Union or from_hint is types.UnionType:
        return " or ".join(type_text(part) for part in typing.get_args(hint))
    if from_hint is typing.Literal:
        return "one of " + ", ".join(repr(part) for part in typing.get_args(hint))
    args = typing.get_args(hint)
    if from_hint is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a tuple of {type_text(args[0])}"
        return f"a tuple ({', '.join(type_text(part) for part in args)})"
    if from_hint is dict:
        return f"a dict of str to {type_text(args[1])}"
    if isinstance(hint, type):
        return hint.__qualname__.replace(".<locals>", "").rsplit(">.", 1)[-1]
    return str(hint)
