"""Experiments by name.

The name is the module path below `experiments` and the class: `megaseq/experiments/mt/multi30k.py`, class `Base`, is
`mt.multi30k.Base`. Other packages add theirs through an entry point of the group `megaseq.experiments` that names a
module or package, or, without being installed, by standing in the working directory and being named, with commas
between several, in the environment variable MEGASEQ_EXPERIMENTS.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

from megaseq.base.errors import AsText, RegistryError, must, suggestion

_ENTRY_POINT_GROUP = "megaseq.experiments"
_BUILT_IN = "megaseq.experiments"
_VARIABLE = "MEGASEQ_EXPERIMENTS"

_experiments: dict[str, type[Any]] = {}
_loaded: set[str] = set()

ClassT = TypeVar("ClassT", bound=type[Any])


def key_of(experiment: type[Any]) -> str:
    """Returns the name under which `experiment` is registered."""
    module = experiment.__module__
    if module.endswith(".experiments") or module == "experiments":
        return experiment.__qualname__
    if ".experiments." in f".{module}":
        below = f".{module}".split(".experiments.", 1)[1]
    else:
        below = module.strip("_").rsplit(".", 1)[-1]
    return f"{below}.{experiment.__qualname__.rsplit('.', 1)[-1]}"


def register(experiment: ClassT) -> ClassT:
    """Class decorator: makes an experiment known by module and class name.

    Raises:
        RegistryError: It has no `params` method, or another class has the same name.
    """
    key = key_of(experiment)
    if not callable(getattr(experiment, "params", None)):
        raise must(
            key, "have a method params()", AsText("without one"), "Derive it from Experiment", kind=RegistryError
        )
    other = _experiments.get(key)
    if other is not None and (other.__module__, other.__qualname__) != (experiment.__module__, experiment.__qualname__):
        raise must(
            key,
            "be registered once",
            AsText(f"registered by {other.__module__} and by {experiment.__module__}"),
            "Rename one of the classes",
            kind=RegistryError,
        )
    _experiments[key] = experiment
    return experiment


def get(name: str) -> type[Any]:
    """Returns the experiment class registered as `name`.

    Raises:
        RegistryError: There is none; the text suggests a close name.
    """
    if name not in _experiments:
        _load_module_of(name)
    if name not in _experiments:
        load_all()
    if name not in _experiments:
        text = f"{name}: no such experiment; {suggestion(name, _experiments)}"
        raise RegistryError(text if text.endswith("?") else f"{text}.")
    return _experiments[name]


def names() -> list[str]:
    """Returns the names of all experiments, sorted."""
    load_all()
    return sorted(_experiments)


def params(name: str) -> Any:
    """Returns fresh params of the experiment registered as `name`."""
    return get(name)().params()


def load_all() -> None:
    """Imports every module below `megaseq.experiments` and below each entry point, once."""
    for root in _roots():
        if root in _loaded:
            continue
        package = _import_root(root)
        for module in pkgutil.walk_packages(getattr(package, "__path__", []), prefix=f"{root}."):
            importlib.import_module(module.name)
        _loaded.add(root)


def packages() -> frozenset[str]:
    """Returns the top-level packages whose modules may be imported by name: megaseq and those of entry points."""
    return frozenset(root.split(".")[0] for root in _roots())


def _roots() -> list[str]:
    installed = (point.value.split(":")[0] for point in entry_points(group=_ENTRY_POINT_GROUP))
    return [_BUILT_IN, *installed, *_named_roots()]


def _named_roots() -> list[str]:
    names = [name.strip() for name in os.environ.get(_VARIABLE, "").split(",") if name.strip()]
    # The `megaseq` command, unlike `python -m megaseq`, does not look in the working directory by itself.
    if names and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    return names


def _import_root(root: str) -> ModuleType:
    if root not in _named_roots():
        return importlib.import_module(root)
    try:
        return importlib.import_module(root)
    except ModuleNotFoundError as error:
        if error.name != root.split(".")[0]:
            raise
        raise must(
            _VARIABLE,
            "name modules that Python finds",
            root,
            "Start from the directory that holds it, or install its package",
            kind=RegistryError,
        ) from None


def _load_module_of(name: str) -> None:
    # The module that the name points to is imported alone, so that one experiment starts without importing them all.
    module = f"{_BUILT_IN}.{name.rpartition('.')[0]}"
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return
    for end in range(2, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if importlib.util.find_spec(prefix) is None:
            return
        importlib.import_module(prefix)
