"""NestedMap: a dict with attribute access that knows how to map, flatten and rebuild a tree of values."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from megaseq.base.errors import suggestion

_PART = re.compile(r"\.?([A-Za-z_]\w*)|\[(\d+)\]")
_FORBIDDEN = frozenset(dir(dict))


class NestedMap(dict[str, Any]):
    """A batch, a state, a set of metrics: names to values, NestedMaps and lists of them.

    Methods that walk the tree descend into NestedMaps and lists, not into tuples or plain dicts: those are leaves.
    Keys are identifiers that are not names of methods, so that `batch.source.ids` always works.
    """

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what `dict` takes."""
        super().__init__()
        self.update(*args, **kwargs)

    # ---- one value -------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name.startswith("__"):
                raise AttributeError(name) from None
            raise AttributeError(_missing(name, self)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(_missing(name, self))
        del self[name]

    def __setitem__(self, key: str, value: Any) -> None:
        _check_key(key)
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Like `dict.update`, with checked keys."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Like `dict.setdefault`, with a checked key."""
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, other: Any) -> Self:  # type: ignore[override]
        self.update(other)
        return self

    def __or__(self, other: Any) -> Self:  # type: ignore[override]
        merged = self.copy()
        merged.update(other)
        return merged

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value at a dotted path such as `a.b[0].c`, or `default` where there is none."""
        try:
            return self.get_item(key)
        except (KeyError, IndexError, TypeError):
            return default

    def get_item(self, path: str) -> Any:
        """Returns the value at a dotted path.

        Raises:
            KeyError: There is no such key; the text lists those that are there.
            IndexError: A list is shorter.
            TypeError: The path goes through a leaf.
        """
        node: Any = self
        for part in _parts(path):
            node = _child(node, part=part, path=path)
        return node

    def set(self, path: str, value: Any) -> None:
        """Writes at a dotted path; missing maps on the way are made, a list may grow by one.

        Raises:
            IndexError: The index is beyond the end of a list.
            TypeError: The path goes through a leaf.
        """
        *way, last = _parts(path)
        node: Any = self
        for part, following in zip(way, [*way[1:], last], strict=True):
            if _has(node, part):
                node = _child(node, part=part, path=path)
            else:
                new: Any = [] if isinstance(following, int) else type(self)()
                _write(node, part=part, value=new, path=path)
                node = new
        _write(node, part=last, value=value, path=path)

    def has(self, path: str) -> bool:
        """Whether there is a value at a dotted path."""
        missing = object()
        return self.get(path, missing) is not missing

    # ---- the tree --------------------------------------------------------------------------------------------------

    def flatten(self) -> list[Any]:
        """Returns the leaves, keys in sorted order."""
        return [value for _, value in self.flatten_items()]

    def flatten_items(self) -> list[tuple[str, Any]]:
        """Returns (path, leaf) pairs, keys in sorted order; paths look like `a.b[0]`."""
        return list(_items(self, path=""))

    def pack(self, values: Iterable[Any]) -> Self:
        """Returns a map of this structure with `values` as leaves, in the order of `flatten`.

        Raises:
            ValueError: There are more or fewer values than leaves.
        """
        given = list(values)
        expected = len(self.flatten_items())
        if len(given) != expected:
            raise ValueError(f"pack: must get as many values as leaves, {expected}, but is {len(given)}.")
        rest = iter(given)
        return self.transform(lambda _: next(rest))

    def transform(self, function: Callable[[Any], Any]) -> Self:
        """Returns a map of this structure with `function(leaf)` as leaves."""
        return self.transform_with_key(lambda _, leaf: function(leaf))

    def transform_with_key(self, function: Callable[[str, Any], Any]) -> Self:
        """Returns a map of this structure with `function(path, leaf)` as leaves."""
        packed: Self = _transform(self, function=function, path="")
        return packed

    def filter(self, keep: Callable[[str, Any], bool]) -> Self:
        """Returns a map of the leaves for which `keep(path, leaf)`; containers that lose all their leaves go too."""
        kept = _filter(self, keep=keep, path="")
        empty: Self = type(self)()
        return empty if kept is _GONE else kept

    def is_compatible(self, other: object) -> bool:
        """Whether `other` is a NestedMap of the same structure."""
        return isinstance(other, NestedMap) and [p for p, _ in self.flatten_items()] == [
            p for p, _ in other.flatten_items()
        ]

    def copy(self) -> Self:
        """Returns a shallow copy."""
        return type(self)(self)

    def deep_copy(self) -> Self:
        """Returns a copy of all NestedMaps and lists, with the same leaves."""
        return self.transform(lambda leaf: leaf)

    @classmethod
    def from_nested_dict(cls, value: Mapping[str, Any]) -> Self:
        """Turns a dict of dicts and lists into NestedMaps and lists."""
        return cls({key: cls._convert(item) for key, item in value.items()})

    @classmethod
    def _convert(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return cls.from_nested_dict(value)
        return [cls._convert(item) for item in value] if isinstance(value, list) else value

    def to_nested_dict(self) -> dict[str, Any]:
        """Turns NestedMaps into plain dicts."""
        return {key: _plain(value) for key, value in self.items()}

    def debug_string(self) -> str:
        """Returns one line `path : shape dtype`, or the value of what is no tensor, for each leaf."""
        return "\n".join(f"{path} : {_describe(leaf)}" for path, leaf in self.flatten_items())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not key.isidentifier() or keyword.iskeyword(key):
        raise ValueError(f"NestedMap: must have identifiers as keys, but is {key!r}.")
    if key in _FORBIDDEN or key in NestedMap.__dict__:
        raise ValueError(f"NestedMap: must not have the name of a method as key, but is {key!r}.")


def _missing(name: str, container: Mapping[str, Any]) -> str:
    if not container:
        return f"{name}: no such key; the map is empty."
    hint = suggestion(name, container)
    listing = f" The keys are {', '.join(sorted(container))}."
    return f"{name}: no such key; {hint}{listing if hint.endswith('?') else '.'}"


def _parts(path: str) -> list[str | int]:
    parts: list[str | int] = []
    at = 0
    while at < len(path):
        match = _PART.match(path, at)
        if match is None or (at == 0 and path[0] in ".["):
            break
        parts.append(match[1] if match[1] is not None else int(match[2]))
        at = match.end()
        if at < len(path) and path[at] not in ".[":
            break
    if at != len(path) or not parts:
        raise KeyError(f"{path!r}: must be a path like a.b[0].c")
    return parts


def _has(node: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(node, list) and part < len(node)
    return isinstance(node, Mapping) and part in node


def _child(node: Any, *, part: str | int, path: str) -> Any:
    if isinstance(part, int):
        if not isinstance(node, list | tuple):
            raise TypeError(f"{path}: must go through a list for [{part}], but is {type(node).__name__}.")
        if part >= len(node):
            raise IndexError(f"{path}: must have an index below {len(node)}, but is {part}.")
        return node[part]
    if not isinstance(node, Mapping):
        raise TypeError(f"{path}: must go through a map for {part}, but is {type(node).__name__}.")
    if part not in node:
        raise KeyError(_missing(part, node))
    return dict.__getitem__(node, part) if isinstance(node, dict) else node[part]


def _write(node: Any, *, part: str | int, value: Any, path: str) -> None:
    if isinstance(part, str):
        if not isinstance(node, dict):
            raise TypeError(f"{path}: must go through a map for {part}, but is {type(node).__name__}.")
        node[part] = value
        return
    if not isinstance(node, list):
        raise TypeError(f"{path}: must go through a list for [{part}], but is {type(node).__name__}.")
    if part > len(node):
        raise IndexError(f"{path}: must have an index of at most {len(node)}, but is {part}.")
    node[part : part + 1] = [value]


def _items(node: Any, *, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, NestedMap):
        for key in sorted(node):
            yield from _items(node[key], path=f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _items(item, path=f"{path}[{index}]")
    else:
        yield path, node


def _transform(node: Any, *, function: Callable[[str, Any], Any], path: str) -> Any:
    if isinstance(node, NestedMap):
        # Visited in sorted order, as `flatten` does; kept in the order of the original.
        new = {
            key: _transform(node[key], function=function, path=f"{path}.{key}" if path else key) for key in sorted(node)
        }
        return type(node)({key: new[key] for key in node})
    if isinstance(node, list):
        return [_transform(item, function=function, path=f"{path}[{index}]") for index, item in enumerate(node)]
    return function(path, node)


_GONE = object()


def _filter(node: Any, *, keep: Callable[[str, Any], bool], path: str) -> Any:
    if isinstance(node, NestedMap):
        kept = {key: _filter(node[key], keep=keep, path=f"{path}.{key}" if path else key) for key in node}
        left = {key: value for key, value in kept.items() if value is not _GONE}
        return type(node)(left) if left else _GONE
    if isinstance(node, list):
        items = [_filter(item, keep=keep, path=f"{path}[{index}]") for index, item in enumerate(node)]
        return [item for item in items if item is not _GONE] or _GONE
    return node if keep(path, node) else _GONE


def _plain(value: Any) -> Any:
    if isinstance(value, NestedMap):
        return value.to_nested_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _describe(leaf: Any) -> str:
    shape = getattr(leaf, "shape", None)
    return f"{list(shape)} {leaf.dtype}" if shape is not None and hasattr(leaf, "dtype") else repr(leaf)
