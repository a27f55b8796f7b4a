"""The two values of a param that nobody has set yet."""

from __future__ import annotations

from typing import Any, Final, NoReturn


class UnsetError(Exception):
    """A rule computed with a param that is not set yet; `check` skips such a rule."""


class Unset:
    """The type of `REQUIRED` and `FROM_PARENT`: equal only to itself; to compute with it is an error."""

    __slots__ = ("name",)
    name: str
    _all: dict[str, Unset] = {}

    def __new__(cls, name: str) -> Unset:
        """Returns the one object called `name`."""
        if name not in cls._all:
            unset = super().__new__(cls)
            unset.name = name
            cls._all[name] = unset
        return cls._all[name]

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[type[Unset], tuple[str]]:
        return Unset, (self.name,)

    def __copy__(self) -> Unset:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Unset:
        return self

    def __bool__(self) -> bool:
        self._fail()

    def _fail(self, *_: object) -> NoReturn:
        raise UnsetError(f"this param is {self.name}: it has no value yet")

    __lt__ = __le__ = __gt__ = __ge__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _fail
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _fail
    __neg__ = __abs__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __contains__ = __getitem__ = _fail


# Typed Any, so that `dim: int = FROM_PARENT` is right for a type checker.
REQUIRED: Final[Any] = Unset("REQUIRED")
"""Default of a param that a person must set."""

FROM_PARENT: Final[Any] = Unset("FROM_PARENT")
"""Default of a param that the owning layer fills when it instantiates this child."""

REMOVE: Final[Any] = Unset("!remove")
"""Written to an item of a dict: takes the item out. In YAML and on the command line: `key: !remove`."""
