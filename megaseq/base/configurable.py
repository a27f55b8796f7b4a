"""Configurable: a class that is made from its own nested Params."""

from __future__ import annotations

import weakref
from typing import Any, cast

from megaseq.base.fields import ParamsMeta
from megaseq.base.params import ParamsBase

_by_name: weakref.WeakValueDictionary[str, type[Any]] = weakref.WeakValueDictionary()


class Configurable:
    """Base of every class with Params.

    ```python
    class Dropout(Configurable):
        class Params(Configurable.Params):
            rate: float = 0.0
            '''Chance of zeroing an element.'''

        def __init__(self, p: Params) -> None:
            super().__init__(p)

    dropout = Dropout.Params(rate=0.1).instantiate()
    ```

    A subclass without own Params gets a subclass of its parents' Params that is bound to it.
    """

    class Params(ParamsBase):
        """Settings of the class in which this is nested."""

    params: Params
    """The frozen params of this object."""

    def __init__(self, p: Params) -> None:
        """Keeps a frozen copy of `p`."""
        self.params = p if p.frozen else p.copy().freeze()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _bind(cls)


def _bind(cls: type[Configurable]) -> None:
    own = cls.__dict__.get("Params")
    if own is None or "cls" in own.__dict__:
        # None of its own, or an alias of another class's: a fresh subclass, so that each class has its own.
        if own is not None:
            parents: tuple[type[Any], ...] = (own,)
        else:
            candidates = [base.Params for base in cls.__bases__ if issubclass(base, Configurable)]
            parents = tuple(
                params
                for params in dict.fromkeys(candidates)
                if not any(other is not params and issubclass(other, params) for other in candidates)
            )
        body = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Params", "__doc__": None}
        own = cast(type[Any], ParamsMeta("Params", parents, body))
        cls.Params = own  # type: ignore[misc]
    own.cls = cls
    _by_name[class_name(cls)] = cls


def class_name(cls: type[Any]) -> str:
    """Returns the name under which `cls:` in YAML finds the class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def known_class(name: str) -> type[Configurable] | None:
    """Returns the Configurable class of that full name, if its module has been imported."""
    return _by_name.get(name)


Configurable.Params.cls = Configurable
_by_name[class_name(Configurable)] = Configurable


def known_names() -> list[str]:
    """Returns the full names of all imported Configurable classes."""
    return list(_by_name)
