"""NVIDIA apex's fused norms, where its CUDA extension is installed.

The package called `apex` on the public index is another one; so the extension is looked for, which only NVIDIA's has,
and nothing of `apex` is imported where it is not there.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from torch import Tensor

from megaseq.base import optional
from megaseq.base.errors import MissingPackageError
from megaseq.kernels.norm.settings import NormKind

EXTENSION = "fused_layer_norm_cuda"


@functools.cache
def missing() -> str | None:
    """Why apex's norms cannot be used, as the end of "..., and"; None where they can."""
    if importlib.util.find_spec(EXTENSION) is None:
        return f"NVIDIA apex's extension {EXTENSION} is not installed (the package apex of the public index is another)"
    try:
        functions = _functions()
    except MissingPackageError:
        return (
            f"NVIDIA apex has its extension {EXTENSION} but cannot be imported; build it anew from NVIDIA's repository"
        )
    names = ("fused_layer_norm_affine", "fused_rms_norm_affine")
    if not all(hasattr(functions, name) for name in names):
        return "the installed apex has no fused_layer_norm_affine and fused_rms_norm_affine"
    return None


def apex_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Returns `x` [..., D] normalised, in its dtype; `weight` and `bias` have that dtype, a centred norm has a bias."""
    shape = (x.shape[-1],)
    if kind.centred:
        centred: Tensor = _functions().fused_layer_norm_affine(x, weight, bias, shape, kind.eps)
        return centred
    result: Tensor = _functions().fused_rms_norm_affine(x, weight, shape, kind.eps)
    return result


def _functions() -> Any:
    return optional("apex.normalization.fused_layer_norm", needed_for="NVIDIA apex's fused norms")
