"""Leaving of a module what one rank's stages need."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def keep_tensors(module: nn.Module, *, names: Collection[str]) -> int:
    """Takes all parameters and buffers out of `module` but those called `names`; returns how many are left.

    The modules stay where they are, so what is left has the names, paths and dropout masks that it has in the whole
    model.
    """
    kept = 0
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in list(child.named_parameters(recurse=False)):
            if f"{prefix}{name}" in names:
                kept += 1
            else:
                child.register_parameter(name, None)
        for name, _ in list(child.named_buffers(recurse=False)):
            if f"{prefix}{name}" in names:
                kept += 1
            else:
                child.register_buffer(name, None)
    return kept
