"""Another class in the same place: `cls:` in YAML, `norm.cls=...` on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from megaseq.base import access, configurable, paths, registry
from megaseq.base.configurable import Configurable
from megaseq.base.errors import ParamsError, must, suggestion
from megaseq.base.params import ParamsBase
from megaseq.base.unset import Unset


def class_at(name: Any, *, path: str) -> type[Configurable]:
    """Returns the Configurable class called `name` (a class is returned as it is).

    Looked up are classes whose module has been imported, and modules of megaseq and of packages that register
    experiments, which are imported for it. Nothing else is ever imported.

    Raises:
        ParamsError: There is no such class, or it is no Configurable.
    """
    found: Any = name if isinstance(name, type) else configurable.known_class(str(name))
    if found is None:
        found = _look_up(str(name))
    if isinstance(found, type) and issubclass(found, Configurable):
        return found
    hint = suggestion(str(name), configurable.known_names())
    remedy = hint[0].upper() + hint[1:] if hint.endswith("?") else "Write module and class: megaseq.layers.norm.RMSNorm"
    raise must(path, "name a Configurable class of megaseq or of a registered package", name, remedy)


def _look_up(name: str) -> Any:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    may_import = parts[0] in registry.packages()
    module: Any = None
    at = 0
    for at in range(1, len(parts)):
        prefix = ".".join(parts[:at])
        if prefix not in sys.modules:
            if not may_import or (at > 1 and not hasattr(module, "__path__")):
                break
            if importlib.util.find_spec(prefix) is None:
                break
            importlib.import_module(prefix)
        module = sys.modules[prefix]
    else:
        at = len(parts)
    found = configurable.known_class(name)
    if found is not None or module is None:
        return found
    # Another name of the class, such as one that a package re-exports; never through an attribute of an object.
    node: Any = module
    for part in parts[len(module.__name__.split(".")) :]:
        node = vars(node).get(part) if isinstance(node, type | type(sys)) else None
    return node


def swapped(old: ParamsBase, *, to: type[Configurable]) -> ParamsBase:
    """Returns params of class `to` that keep what was set explicitly in `old` and exists, with its type, in `to`."""
    new = to.Params()
    new._place = old.params_path
    fresh = type(old)()
    for name in old._values:
        if name in new and touched(old, name=name, fresh=fresh) and not isinstance(old._values[name], Unset):
            writes = old._writes.get(name)
            try:
                new._write(name, old._values[name], origin=writes[-1].origin if writes else "")
            except ParamsError:
                continue  # the same name means something else there
            new._writes[name] = writes or ()
    return new


def touched(params: ParamsBase, *, name: str, fresh: ParamsBase) -> bool:
    """Whether a field, or anything below it, was written after `params` started as `fresh` did."""
    if any(writes != fresh._writes.get(key) for key, writes in params._writes.items() if paths.split(key)[0] == name):
        return True
    return _differs(params._values[name], fresh._values[name])


def _differs(value: Any, fresh: Any) -> bool:
    if isinstance(value, ParamsBase):
        return type(value) is not type(fresh) or any(touched(value, name=name, fresh=fresh) for name in value._values)
    if isinstance(value, tuple) and isinstance(fresh, tuple):
        return len(value) != len(fresh) or any(map(_differs, value, fresh))
    if isinstance(value, dict) and isinstance(fresh, dict):
        return value.keys() != fresh.keys() or any(_differs(item, fresh[key]) for key, item in value.items())
    return False


def change_class(params: ParamsBase, *, to: Any, origin: str) -> None:
    """Puts params of another class into the place of `params` in their tree.

    Raises:
        ParamsError: There is no such class, it does not fit the type of the place, or `params` is the root.
    """
    path = paths.join(params.params_path, "cls")
    cls = class_at(to, path=path)
    if cls.Params is type(params):
        return
    owner = params._owner
    if owner is None:
        raise must(path, "stay as it is at the root", cls.__name__, "Choose another experiment")
    new = swapped(params, to=cls)
    access.put(owner, keys=paths.split(params._key), value=lambda hint, at, current: new, origin=origin)
