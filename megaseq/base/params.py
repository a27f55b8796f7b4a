"""Params: the typed, documented, hierarchical settings of every configurable class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform, overload

from megaseq.base import paths, source
from megaseq.base.container import ParamsDict
from megaseq.base.errors import AsText, ParamsError, Problem, UnknownParamError, must, shown, suggestion
from megaseq.base.fields import Field, ParamsMeta, doc_of, fields_of, hints_of
from megaseq.base.typecheck import Mapping, check_hint, coerce
from megaseq.base.unset import FROM_PARENT, REQUIRED, Unset, UnsetError

ParamsT = TypeVar("ParamsT", bound="ParamsBase")


class Write(NamedTuple):
    """One write to a param."""

    origin: str
    """`file:line`, or `command line`."""
    value: str
    """What was written, for a person to read."""


@dataclass_transform(kw_only_default=True)
class ParamsBase(metaclass=ParamsMeta):
    """Base of all Params; see `Configurable` for how they are declared.

    A tree of params never holds the same object in two places: writing params that already belong to a tree (or are
    frozen) writes a copy of them, so that an edit in one place has no effect in another.
    """

    __slots__ = ("_frozen", "_key", "_owner", "_place", "_values", "_writes")

    cls: ClassVar[type[Any]]
    """The Configurable class that these params make."""

    if TYPE_CHECKING:
        _values: dict[str, Any]
        _writes: dict[str, tuple[Write, ...]]
        _owner: ParamsBase | None
        _key: str
        _place: str
        _frozen: bool
    else:
        # Out of a type checker's sight: it shall know each field, and report every other name.
        def __init__(self, **values: Any) -> None:
            """Starts from the defaults and writes `values`."""
            self._start()
            origin = source.caller() if values else ""
            for name, value in values.items():
                self._write(name, value, origin=origin)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name in ParamsBase.__slots__:
                raise AttributeError(name)
            try:
                return self._values[name]
            except KeyError:
                raise self._unknown(name) from None

        def __setattr__(self, name: str, value: Any) -> None:
            if name in ParamsBase.__slots__:
                object.__setattr__(self, name, value)
            else:
                self._write(name, value, origin=source.caller())

        def __delattr__(self, name: str) -> None:
            raise must(paths.join(self.params_path, name), "stay", AsText("being deleted"), "Set another value")

    # ---- one value -------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """Returns the value at a dotted path; items of tuples and dicts by index and key.

        Raises:
            ParamsError: There is nothing at the path; the text has the full path of what is missing.
        """
        from megaseq.base import access

        return access.get(self, keys=paths.split(path))

    def set(self, path: str, value: Any, *, origin: str = "") -> Self:
        """Writes `value` at a dotted path; a `*` in the path stands for every item of a tuple or dict.

        Args:
            path: Such as `encoder.layers.3.dropout`, `layers.*.ffn.dropout`, or `norm.cls` to swap a child's class.
            value: Checked like an assignment.
            origin: Who writes, for `origin()`; the caller's file and line when empty.

        Raises:
            ParamsError: There is no such param, or the value breaks its type.
        """
        from megaseq.base import access

        origin = origin or source.caller()
        access.put(self, keys=paths.split(path), value=lambda hint, at, current: value, origin=origin)
        return self

    def set_text(self, path: str, text: str, *, origin: str = "command line") -> Self:
        """Writes a value given as text, read by YAML 1.2 rules where the type of the param decides what it can be."""
        from megaseq.base import access, overlay

        access.put(self, keys=paths.split(path), value=overlay.reader(text, origin=origin), origin=origin)
        return self

    def origin(self, path: str) -> str:
        """Returns where the value at `path` was set last: `file:line`, a YAML file and line, or `command line`."""
        from megaseq.base import access

        return access.history(self, keys=paths.split(path))[-1].origin

    def history(self, path: str) -> list[Write]:
        """Returns every write to `path`, the class default first, the one that counts last."""
        from megaseq.base import access

        return access.history(self, keys=paths.split(path))

    def doc(self, path: str) -> str:
        """Returns the docstring of the param at `path`."""
        from megaseq.base import access

        owner, name = access.owner_of(self, keys=paths.split(path))
        return doc_of(type(owner), name)

    # ---- whole -----------------------------------------------------------------------------------------------------

    @property
    def params_path(self) -> str:
        """Where these params stand in their tree; for a copy, where the original stood; empty for a root."""
        return paths.concat(self._owner.params_path, self._key) if self._owner is not None else self._place

    @property
    def frozen(self) -> bool:
        """Whether writes are refused."""
        return self._frozen

    def copy(self) -> Self:
        """Returns an unfrozen deep copy, with the memory of who set what."""
        twin = type(self).__new__(type(self))
        twin._owner, twin._key, twin._place, twin._frozen = None, "", self.params_path, False
        twin._writes = dict(self._writes)
        twin._values = {}
        for name, value in self._values.items():
            twin._values[name] = twin._adopt(value, key=name, always_copy=True)
        return twin

    def replace(self, **values: Any) -> Self:
        """Returns an unfrozen copy with some params changed."""
        twin = self.copy()
        origin = source.caller()
        for name, value in values.items():
            twin._write(name, value, origin=origin)
        return twin

    def freeze(self) -> Self:
        """Refuses every later write to these params and all below; returns self."""
        for _, params in walk(self):
            params._frozen = True
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParamsBase):
            return NotImplemented
        return same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"{type(self).__qualname__.replace('.<locals>', '')}({parts})"

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *fields_of(type(self))]

    def __contains__(self, name: str) -> bool:
        return name in fields_of(type(self))

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._values, self._writes, self._frozen, self.params_path)

    # ---- rules -----------------------------------------------------------------------------------------------------

    def validate(self) -> Iterator[Problem | str]:
        """Yields the broken rules between the params of this class; override and begin with `yield from super()...`.

        Paths are relative to these params. A rule that meets a param without a value is skipped. A str is taken as
        the whole sentence: `hidden_dim: must be even, but is 3. Add 1.`
        """
        yield from ()

    def check(self) -> list[Problem]:
        """Returns every problem of these params and all below, each with its full path; FROM_PARENT is none."""
        return [problem for _, params in walk(self) for problem in params._own_problems()]

    def instantiate(self, **kwargs: Any) -> Any:
        """Checks, freezes a copy, and returns `cls(copy, **kwargs)`.

        Raises:
            ParamsError: Everything that `check` finds and each FROM_PARENT left in these params, one a line.
        """
        problems = self.check()
        for name, value in self._values.items():
            if value is FROM_PARENT:
                path = paths.join(self.params_path, name)
                problems.append(Problem(path=path, rule="be filled by the owner", value=value, remedy="Set it"))
        if problems:
            raise ParamsError("\n".join(str(problem) for problem in problems))
        return self.cls(self.copy().freeze(), **kwargs)

    def default_item(self, field: str, key: str) -> ParamsBase | None:
        """Returns what `get` and `set` find at a `key` that the dict `field` lacks; None: it is an error."""
        return None

    # ---- the tree --------------------------------------------------------------------------------------------------

    @overload
    def find(self, kind: type[ParamsT]) -> list[tuple[str, ParamsT]]: ...
    @overload
    def find(self, kind: type[Any]) -> list[tuple[str, Any]]: ...
    def find(self, kind: type[Any]) -> list[tuple[str, Any]]:
        """Returns (path, params) of all params, here and below, of a Configurable class or a Params class."""
        if isinstance(kind, ParamsMeta):
            return [(path, params) for path, params in walk(self) if isinstance(params, kind)]
        return [(path, params) for path, params in walk(self) if issubclass(params.cls, kind)]

    def visit(self, function: Callable[[str, ParamsBase], object]) -> None:
        """Calls `function(path, params)` for these params (path empty) and all below, parents first."""
        for path, params in list(walk(self)):
            function(path, params)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yields (path, value) of everything that is not params, in the order of declaration."""
        for name, value in self._values.items():
            yield from _leaves(value, path=name)

    def diff(self, other: ParamsBase) -> list[str]:
        """Returns the differing lines: `path : mine -> theirs`, or with `-` (only mine) and `+` (only theirs)."""
        from megaseq.base import text

        return text.diff(self, other=other)

    # ---- text ------------------------------------------------------------------------------------------------------

    def to_text(self, *, origins: bool = False) -> str:
        """Returns one line `path : value` for each leaf and class, with `# file:line` when `origins`."""
        from megaseq.base import text

        return text.to_text(self, origins=origins)

    @classmethod
    def from_text(cls_, content: str, *, filename: str = "text") -> Self:
        """Builds params from what `to_text` wrote.

        Raises:
            ParamsError: A line is malformed or does not fit, with file and line.
        """
        from megaseq.base import text

        return text.from_text(content, kind=cls_, filename=filename)

    def to_yaml(self, *, changed_only: bool = False, base: ParamsBase | None = None, origins: bool = False) -> str:
        """Returns YAML that `params_from_yaml` (with the same `base`) turns back into equal params.

        Args:
            changed_only: Leave out what is equal in `base`.
            base: What the YAML will be laid over; `type(self)()` when None.
            origins: Write `# file:line` after each value.
        """
        from megaseq.base import text

        return text.to_yaml(self, changed_only=changed_only, base=base, origins=origins)

    def apply_yaml(self, content: str, *, filename: str = "yaml") -> Self:
        """Lays YAML over these params.

        Raises:
            ParamsError: All that does not fit, each with file and line.
        """
        from megaseq.base import overlay

        overlay.apply_yaml(self, content=content, filename=filename)
        return self

    # ---- internals, shared within megaseq/base ---------------------------------------------------------------------

    def _start(self) -> None:
        self._owner, self._key, self._place, self._frozen = None, "", "", False
        self._writes = {}
        self._values = {}
        if "cls" not in _bound_names(type(self)):
            raise must(type(self).__qualname__, "be nested in a Configurable", AsText("a class of its own"))
        for name, default in _defaults_of(type(self)).items():
            self._values[name] = self._adopt(default, key=name, always_copy=True)

    def _unknown(self, name: str) -> UnknownParamError:
        path = paths.join(self.params_path, name)
        text = f"{path}: {self.cls.__name__} has no such param; {suggestion(name, fields_of(type(self)))}"
        return UnknownParamError(text if text.endswith("?") else f"{text}.")

    def _refuse_if_frozen(self, path: str, value: Any) -> None:
        if self._frozen:
            raise must(path, "stay as it is once frozen", AsText(f"set to {shown(value)}"), "Write to a copy()")

    def _write(self, name: str, value: Any, *, origin: str) -> None:
        hint = hints_of(type(self)).get(name)
        if name not in fields_of(type(self)):
            raise self._unknown(name)
        path = paths.join(self.params_path, name)
        self._refuse_if_frozen(path, value)
        checked = coerce(value, hint=hint, path=path)
        old = self._values[name]
        if checked is not old:
            adopted = self._adopt(checked, key=name)
            self._release(old)
            self._values[name] = adopted
        self._note(name, checked, origin=origin)

    def _note(self, key: str, value: Any, *, origin: str) -> None:
        self._writes[key] = (*self._writes.get(key, ())[-9:], Write(origin, brief(value)))

    def _adopt(self, value: Any, *, key: str, always_copy: bool = False) -> Any:
        if isinstance(value, ParamsBase):
            if always_copy or value._owner is not None or value._frozen or value is self._root():
                value = value.copy()
            value._owner, value._key = self, key
            return value
        if type(value) is tuple:
            items = (
                self._adopt(item, key=paths.join(key, str(i)), always_copy=always_copy) for i, item in enumerate(value)
            )
            return tuple(items)
        if isinstance(value, Mapping | ParamsDict):
            plain = Mapping(value)
            plain.item_hint = value.item_hint if isinstance(value, Mapping) else value._item_hint
            if always_copy:
                for name, item in plain.items():
                    plain[name] = item.copy() if isinstance(item, ParamsBase) else item
            return ParamsDict(plain, owner=self, key=key)
        return value

    def _release(self, value: Any) -> None:
        if isinstance(value, ParamsBase):
            value._place, value._owner, value._key = value.params_path, None, ""
        elif isinstance(value, tuple):
            for item in value:
                self._release(item)
        elif isinstance(value, dict):
            for item in value.values():
                self._release(item)

    def _root(self) -> ParamsBase:
        return self if self._owner is None else self._owner._root()

    def _own_problems(self) -> Iterator[Problem]:
        here = self.params_path
        for name, value in self._values.items():
            if value is REQUIRED:
                doc = doc_of(type(self), name).split("\n\n")[0].replace("\n", " ").rstrip(".")
                remedy = f"It is: {doc[0].lower()}{doc[1:]}" if doc else "Set it"
                yield Problem(path=paths.join(here, name), rule="be set", value=value, remedy=remedy)
        try:
            for found in self.validate():
                yield _with_path(found, path=here)
        except UnsetError:
            return


def _with_path(found: Problem | str, *, path: str) -> Problem:
    if isinstance(found, Problem):
        full = paths.concat(path, found.path)
        return Problem(path=full, rule=found.rule, value=found.value, remedy=found.remedy)
    return SentenceProblem(path=path, rule=found, value=None)


class SentenceProblem(Problem):
    """A problem that `validate` gave as a whole sentence."""

    def __str__(self) -> str:
        head = self.rule.split(": ")[0]
        keys, end = paths.scan(head)
        if keys and end == len(head) and ": " in self.rule:
            return paths.concat(self.path, self.rule)
        return f"{self.path}: {self.rule}" if self.path else self.rule


def _bound_names(params_class: type[ParamsBase]) -> dict[str, Any]:
    return params_class.__dict__  # type: ignore[return-value]


_ready: dict[type[ParamsBase], dict[str, Any]] = {}


def _defaults_of(params_class: type[ParamsBase]) -> dict[str, Any]:
    found = _ready.get(params_class)
    if found is None:
        hints = hints_of(params_class)
        found = {}
        for field in fields_of(params_class).values():
            path = f"{params_class.__qualname__}.{field.name}"
            check_hint(hints[field.name], path=path)
            found[field.name] = coerce(field.default, hint=hints[field.name], path=path)
        _ready[params_class] = found
    return found


def _rebuild(
    kind: type[ParamsBase], values: dict[str, Any], writes: dict[str, tuple[Write, ...]], frozen: bool, place: str
) -> ParamsBase:
    params = kind()
    for name, value in values.items():
        params._write(name, value, origin="")
    params._writes = dict(writes)
    params._place = place
    return params.freeze() if frozen else params


def brief(value: Any) -> str:
    """Writes a value in a few words: params by their class."""
    if isinstance(value, ParamsBase):
        return value.cls.__name__
    if isinstance(value, tuple) and any(isinstance(item, ParamsBase) for item in value):
        return f"({', '.join(brief(item) for item in value)})"
    if isinstance(value, dict) and any(isinstance(item, ParamsBase) for item in value.values()):
        return f"{{{', '.join(f'{key}: {brief(item)}' for key, item in value.items())}}}"
    return shown(value)


def walk(params: ParamsBase) -> Iterator[tuple[str, ParamsBase]]:
    """Yields (relative path, params) of `params` itself (path empty) and all below it, parents first."""
    yield "", params
    for name, value in params._values.items():
        yield from _walk(value, path=name)


def _walk(value: Any, *, path: str) -> Iterator[tuple[str, ParamsBase]]:
    if isinstance(value, ParamsBase):
        for below, params in walk(value):
            yield paths.concat(path, below), params
    elif isinstance(value, tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, path=paths.join(path, str(key)))


def holds_params(value: Any) -> bool:
    """Whether a tuple or dict has params anywhere in it."""
    if isinstance(value, tuple | dict):
        return any(holds_params(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, ParamsBase)


def is_expanded(value: Any) -> bool:
    """Whether the items of a container are written one a line: dicts with items, and tuples that hold params."""
    return bool(value) if isinstance(value, dict) else holds_params(value)


def _leaves(value: Any, *, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, ParamsBase):
        for below, leaf in value.leaves():
            yield paths.concat(path, below), leaf
    elif is_expanded(value):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, path=paths.join(path, str(key)))
    else:
        yield path, value


def same(one: Any, other: Any) -> bool:
    """Deep equality that tells 1 from True and 1.0, and finds nan equal to nan."""
    if isinstance(one, ParamsBase) and isinstance(other, ParamsBase):
        return type(one) is type(other) and all(same(value, other._values[key]) for key, value in one._values.items())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and bool(one == other)


__all__ = ["Field", "ParamsBase", "Unset", "Write"]
