"""The one place that imports the compiled extension `megaseq._csrc`.

Every function of the extension has a NumPy or torch twin that gives the same values bit for bit, so callers ask
`extension()` and take their twin when it returns None:

- data/order.py `permute`, data/packing.py `pack`: integers, equal element by element.
- kernels/dropout: `dropout_mask`, `dropout_apply` and `dropout_apply_runs`; the formula is in csrc/dropout.h.

Three are equal but for rounding:

- attention within segments, kernels/attention/host.py, whose twin is segments.py;
- attention to places of a cache, kernels/attention/lookup.py, whose twin is MovingCache of layers/token_cache.py;
- the best log-probabilities, kernels/beam_step/log_softmax.py.

`MEGASEQ_NATIVE=0` switches the extension off, which is how the tests reach the twins.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

# Raised together with `interface_version` in csrc/module.cc whenever a signature or a result changes: an extension that
# an older checkout built must not be mixed with newer Python.
INTERFACE_VERSION = 8

_logger = logging.getLogger("megaseq")


def extension() -> Any | None:
    """Returns the compiled module, or None where there is none (said once in the log) or it is switched off."""
    if os.environ.get("MEGASEQ_NATIVE") == "0":
        return None
    module, reason = _load()
    if module is None:
        _say_once(reason)
    return module


def available() -> bool:
    """Tells whether the compiled extension is used, without a word in the log."""
    return os.environ.get("MEGASEQ_NATIVE") != "0" and _load()[0] is not None


def describe() -> str:
    """Returns one line that says which implementation is used and why."""
    if os.environ.get("MEGASEQ_NATIVE") == "0":
        return "megaseq: the C++ extension is switched off by MEGASEQ_NATIVE=0; the NumPy fallback is used."
    module, reason = _load()
    return reason if module is None else f"megaseq: the C++ extension is used ({module.__file__})."


@functools.cache
def _load() -> tuple[Any | None, str]:
    remedy = "Install a C++20 compiler and install megaseq again to have the faster one."
    try:
        module = importlib.import_module("megaseq._csrc")
    except ImportError as error:
        return None, f"megaseq: the C++ extension is not there ({error}); the NumPy fallback is used. {remedy}"
    if module.interface_version() != INTERFACE_VERSION:
        found = module.interface_version()
        return None, (
            f"megaseq: the C++ extension has interface {found}, this Python needs {INTERFACE_VERSION}; "
            f"the NumPy fallback is used. {remedy}"
        )
    return module, ""


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning(reason)
