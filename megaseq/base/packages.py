"""The one door to optional packages."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from types import ModuleType

from megaseq.base.errors import AsText, MissingPackageError, must

# Where the name that is installed differs from the one that is imported.
_INSTALLED_AS = {"yaml": "ruamel.yaml", "torch.utils.tensorboard": "tensorboard", "sklearn": "scikit-learn"}


def optional(name: str, *, needed_for: str) -> ModuleType:
    """Imports the optional package `name`.

    Args:
        name: The module to import, such as "deepspeed".
        needed_for: The feature that needs it, in the user's words: "ZeRO".

    Raises:
        MissingPackageError: It is not installed (the text says how to install it) or fails to import.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not (name == missing or name.startswith(f"{missing}.")) and name not in _INSTALLED_AS:
            found, remedy = f"not importable: it needs {missing}", f"Run: pip install {missing}"
        else:
            found, remedy = "not installed", f"Run: pip install {_requirement(name)}"
    except Exception as error:  # a broken installation fails with whatever its own code raises
        found, remedy = f"broken ({type(error).__name__}: {error})", f"Reinstall {name.split('.')[0]}"
    raise must(needed_for, f"have the package {name}", AsText(found), remedy, kind=MissingPackageError)


def _requirement(name: str) -> str:
    """What pip is to install for the module `name`, in the versions that megaseq's own metadata asks for."""
    package = _INSTALLED_AS.get(name, name.split(".")[0])
    try:
        requirements = metadata.requires("megaseq") or []
    except metadata.PackageNotFoundError:
        return package
    for requirement in requirements:
        found = re.match(r"([\w.-]+)\s*([^;]*)", requirement)
        if found and found[1].lower().replace("_", "-") == package.lower().replace("_", "-") and found[2].strip():
            return f"'{found[1]}{found[2].strip()}'"
    return package
