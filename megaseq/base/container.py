"""The dict that a param of type `dict[str, T]` holds: it checks what is written and freezes with its owner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from megaseq.base import paths, source
from megaseq.base.errors import AsText, ParamsError, must
from megaseq.base.typecheck import Mapping, coerce
from megaseq.base.unset import REMOVE

if TYPE_CHECKING:
    from megaseq.base.params import ParamsBase


class ParamsDict(dict[str, Any]):
    """A dict inside params; every write checks the type of the item and remembers who wrote it."""

    __slots__ = ("_item_hint", "_key", "_owner")
    _owner: ParamsBase
    _key: str
    _item_hint: Any

    def __init__(self, items: Mapping, *, owner: ParamsBase, key: str) -> None:
        """Takes checked `items` for the param at `key` of `owner`."""
        super().__init__()
        self._owner, self._key, self._item_hint = owner, key, items.item_hint
        for name, item in items.items():
            super().__setitem__(name, owner._adopt(item, key=paths.join(key, name)))

    @property
    def params_path(self) -> str:
        """Full path of this dict."""
        return paths.concat(self._owner.params_path, self._key)

    def put(self, key: str, value: Any, *, origin: str) -> None:
        """Writes one item.

        Raises:
            ParamsError: The params are frozen, or key or value is of the wrong type.
        """
        if value is REMOVE:
            if key not in self:
                raise self._lacks(key)
            del self[key]
            return
        path = paths.join(self.params_path, str(key))
        self._owner._refuse_if_frozen(path, value)
        # As a dict of one, so that the key is checked too.
        checked = coerce({key: value}, hint=dict[str, self._item_hint], path=self.params_path)[key]  # type: ignore[name-defined]
        old = self.get(key)
        if checked is not old or old is None:
            self._owner._release(old)
            checked = self._owner._adopt(checked, key=paths.join(self._key, key))
        super().__setitem__(key, checked)
        self._owner._note(paths.join(self._key, key), checked, origin=origin)

    def item(self, key: str) -> Any:
        """Returns the item at `key`, or what the owner's `default_item` makes for it.

        Raises:
            ParamsError: There is neither.
        """
        if key in self:
            return self[key]
        made = self._owner.default_item(self._key, key)
        if made is None:
            raise self._lacks(key)
        made = made.copy()
        made._place = paths.join(self.params_path, key)
        return made

    def _lacks(self, key: str) -> ParamsError:
        have = ", ".join(map(repr, self)) or "no keys"
        return must(self.params_path, f"have the key {key!r}", AsText(f"a dict with {have}"), "Add it first")

    def __setitem__(self, key: str, value: Any) -> None:
        self.put(key, value, origin=source.caller())

    def __delitem__(self, key: str) -> None:
        self._owner._refuse_if_frozen(paths.join(self.params_path, str(key)), None)
        self._owner._release(self.get(key))
        super().__delitem__(key)
        self._owner._note(self._key, self, origin=source.caller())

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ParamsDict:  # type: ignore[override]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        key = next(reversed(self))
        return key, self.pop(key)

    def clear(self) -> None:
        for key in list(self):
            del self[key]

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Alone it is pickled as a plain dict: without its owner there is nobody to check its writes.
        return dict, (dict(self),)

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**self, **other}

    @classmethod
    def fromkeys(cls, iterable: Iterable[str], value: Any = None) -> NoReturn:  # type: ignore[override]
        raise TypeError("ParamsDict has no fromkeys: use dict.fromkeys")
