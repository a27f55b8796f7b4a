"""Params, registry, NestedMap, errors: what everything else stands on. No torch."""

from __future__ import annotations

from megaseq.base import errors, registry
from megaseq.base.configurable import Configurable
from megaseq.base.errors import (
    CheckpointError,
    DataError,
    MegaseqError,
    MissingPackageError,
    ParamsError,
    Problem,
    RegistryError,
    TrainingError,
    must,
)
from megaseq.base.nested_map import NestedMap
from megaseq.base.overlay import apply_overrides, params_from_yaml
from megaseq.base.packages import optional
from megaseq.base.params import ParamsBase
from megaseq.base.registry import register
from megaseq.base.unset import FROM_PARENT, REQUIRED

Params = ParamsBase

__all__ = [
    "FROM_PARENT",
    "REQUIRED",
    "CheckpointError",
    "Configurable",
    "DataError",
    "MegaseqError",
    "MissingPackageError",
    "NestedMap",
    "Params",
    "ParamsBase",
    "ParamsError",
    "Problem",
    "RegistryError",
    "TrainingError",
    "apply_overrides",
    "errors",
    "must",
    "optional",
    "params_from_yaml",
    "register",
    "registry",
]
