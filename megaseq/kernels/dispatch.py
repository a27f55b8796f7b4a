"""Which implementation of an op runs.

`MEGASEQ_KERNELS` names one: `auto` (the default), or an implementation. A bare name holds for every op that has an
implementation of that name, and for the others nothing changes; `attention=reference,dropout=native` goes op by op.
A request that cannot run here is an error, never a silent fallback; what `auto` chose is logged once for each op.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from megaseq.kernels.checks import KernelError

logger = logging.getLogger(__name__)

VARIABLE = "MEGASEQ_KERNELS"

IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "activation": ("reference", "triton"),
    "adamw": ("reference", "torch", "apex", "triton"),
    "attention": ("reference", "sdpa", "segments", "native", "triton"),
    "beam_step": ("reference", "native", "triton"),
    "cross_entropy": ("reference", "chunked", "triton"),
    "dropout": ("reference", "native", "triton"),
    "decode_attention": ("reference", "native", "triton"),
    "grouped_linear": ("reference", "grouped_mm"),
    "norm": ("reference", "torch", "apex", "triton"),
    "quantize": ("reference", "triton"),
    "rotary": ("reference", "triton"),
    "scaled_linear": ("reference", "int_mm", "fp32", "scaled_mm", "triton"),
}
"""All ops and the names of their implementations, also of those that need hardware or packages that may be absent."""

# The dictionary behind os.environ and its key: a look-up takes a tenth of the time of one through os.environ.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = os.environ.encodekey(VARIABLE) if hasattr(os.environ, "_data") else VARIABLE

_logged: set[tuple[str, str]] = set()


def requested(op: str) -> str:
    """What the environment asks for `op`: the name of an implementation, or "auto".

    Raises:
        KernelError: if `MEGASEQ_KERNELS` cannot be read, or names an op or an implementation that does not exist.
    """
    # torch.compile warns of the cache behind `_parse`: only those who set the variable shall see that.
    return "auto" if undirected() else _parse(os.environ[VARIABLE]).get(op, "auto")


def undirected() -> bool:
    """Whether the environment leaves every op to `auto`: a cheap question, for ops that take microseconds."""
    return _KEY not in _ENVIRONMENT


def choose(op: str, *, automatic: str, impossible: Mapping[str, str]) -> str:
    """The implementation of `op` that this call runs.

    Args:
        op: the op's name, a key of `IMPLEMENTATIONS`.
        automatic: what `auto` takes for this call.
        impossible: the implementations that cannot run this call, each with the reason.

    Returns:
        The name of an implementation.

    Raises:
        KernelError: if the environment asks for an implementation that cannot run this call.
    """
    wanted = requested(op)
    if wanted == "auto":
        log_once(op, automatic)
        return automatic
    if wanted in impossible:
        others = ", ".join(name for name in IMPLEMENTATIONS[op] if name not in impossible)
        raise KernelError(
            f"{op}: {VARIABLE} must name an implementation that can run this call, but is {wanted}, and "
            f"{impossible[wanted]}. Use auto, or one of: {others}."
        )
    return wanted


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def log_once(op: str, automatic: str) -> None:
    """Says what `auto` chose; under torch.compile when the call is traced, as logging itself cannot be."""
    if (op, automatic) not in _logged:
        _logged.add((op, automatic))
        logger.info("%s: auto runs the %s implementation", op, automatic)


def automatic_choices() -> dict[str, list[str]]:
    """What `auto` has chosen in this process so far, by op: most ops have one implementation, some one for each use."""
    found: dict[str, list[str]] = {}
    for op, automatic in sorted(_logged):
        found.setdefault(op, []).append(automatic)
    return found


@lru_cache(maxsize=32)
def _parse(text: str) -> Mapping[str, str]:
    """Reads the variable's value into {op: implementation}; cached, as every call of every op asks."""
    chosen: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        op, separator, name = part.rpartition("=")
        ops: Sequence[str] = (op,) if separator else tuple(IMPLEMENTATIONS)
        unknown_op = bool(separator) and op not in IMPLEMENTATIONS
        matches = () if unknown_op else tuple(o for o in ops if name == "auto" or name in IMPLEMENTATIONS[o])
        if not matches:
            names = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
            raise KernelError(
                f"{VARIABLE}: each item must be NAME or OP=NAME with OP one of {', '.join(IMPLEMENTATIONS)} and NAME "
                f"auto or an implementation of it ({', '.join(names)}), but is {part!r}. Correct or unset it."
            )
        chosen.update(dict.fromkeys(matches, name))
    return chosen
