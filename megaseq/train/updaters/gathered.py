"""A module whose parameters ZeRO 3 shares out, made whole for a while."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def gathered(module: nn.Module, *, optimizer: Any) -> Iterator[None]:
    """Within the context this rank has all parameters of `module`, and no forward pass waits for other ranks.

    So ranks may do unequal amounts of work: decode sentences of other lengths, say. All enter and leave together.

    Args:
        module: in the hands of DeepSpeed's stage 3.
        optimizer: DeepSpeed's.
    """
    parameters: list[Any] = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    absent = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        absent[0].all_gather(param_list=absent)
    with _without_hooks(module, optimizer=optimizer):
        try:
            yield
        finally:
            if absent:
                absent[0].partition(param_list=absent, has_been_updated=False)


@contextlib.contextmanager
def _without_hooks(module: nn.Module, *, optimizer: Any) -> Iterator[None]:
    """Takes DeepSpeed's hooks, which gather and share out around every forward pass, off all modules for a while."""
    offload = optimizer.parameter_offload
    own = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    kept: list[tuple[nn.Module, str, OrderedDict[int, Any]]] = []
    for child in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks: OrderedDict[int, Any] = getattr(child, name)
            if own & hooks.keys():
                kept.append((child, name, hooks))
                setattr(child, name, OrderedDict((key, hook) for key, hook in hooks.items() if key not in own))
    try:
        yield
    finally:
        for child, name, hooks in kept:
            setattr(child, name, hooks)
