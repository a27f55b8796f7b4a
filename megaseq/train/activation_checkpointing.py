"""What a layer keeps of its forward pass for the backward pass: everything, or only what cannot be computed again.

Dropout is a function of (seed, step, path, position), so that a layer computed again computes the same, and no random
state has to be kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaseq.base import Configurable, Problem
from megaseq.base.errors import must
from megaseq.layers.attention import Attention
from megaseq.layers.base import Layer
from megaseq.layers.transformer import Stack, TransformerLayer

Mode = Literal["none", "full", "selective", "offload"]


class ActivationCheckpointing(Configurable):
    """How each Transformer layer saves memory; only its params are used."""

    class Params(Configurable.Params):
        mode: Mode = "none"
        """none: all is kept. full: a layer keeps its input and is computed again in the backward pass (Chen et al.
        2016). selective: only scores, weights and sums of the attentions are (Korthikanti et al. 2022). offload:
        what a layer keeps waits in host memory."""
        rules: dict[str, Mode] = {}
        """Mode of the layers whose path, `task.encoder.layers.3`, has a match of the regular expression; the first
        that matches wins over `mode`."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports patterns that are no regular expressions."""
            yield from super().validate()
            for pattern in self.rules:
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"rules: must have regular expressions as keys, but has {pattern!r} ({error}). Correct it."

    params: Params


def mode_of(path: str, *, params: ActivationCheckpointing.Params) -> Mode:
    """Returns the mode of the layer at `path`."""
    for pattern, mode in params.rules.items():
        if re.search(pattern, path):
            return mode
    return params.mode


def checkpoint_activations(
    module: nn.Module, *, params: ActivationCheckpointing.Params, compiled: bool = False, prefix: str = "task"
) -> dict[str, Mode]:
    """Makes every Transformer layer of `module` keep what its mode says; returns the modes by path.

    Args:
        module: a task, or a part of one; to be called once.
        params: the modes.
        compiled: whether `compile_layers` was called before.
        prefix: path of `module` itself.
    """
    layers = {
        f"{prefix}.{name}".strip("."): layer
        for name, layer in module.named_modules()
        if isinstance(layer, TransformerLayer)
    }
    modes = {path: mode_of(path, params=params) for path in layers}
    for path, layer in layers.items():
        if modes[path] == "full":
            _replace(layer, "forward", _recomputed(layer.forward, layer=layer))
        elif modes[path] == "offload":
            _replace(layer, "forward", _offloaded(layer.forward))
        elif modes[path] == "selective":
            for attention in layer.modules():
                if isinstance(attention, Attention):
                    attend = _recomputed(attention.attend, layer=attention)
                    if compiled:
                        attend = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
                    _replace(attention, "attend", attend)
    return modes


def layer_paths(task: Configurable.Params, *, prefix: str = "task") -> list[str]:
    """Returns the paths of all Transformer layers that a task of these params has, on whatever rank."""
    stacks = [(path, stack.num_layers) for path, stack in task.find(Stack)]
    return [f"{prefix}.{path}.layers.{index}" for path, layers in stacks for index in range(layers)]


def check_rules(params: ActivationCheckpointing.Params, *, task: Configurable.Params) -> None:
    """Raises ParamsError for a rule that matches no layer of the whole model."""
    paths = layer_paths(task)
    for pattern in params.rules:
        if not any(re.search(pattern, path) for path in paths):
            raise must(
                "train.activation_checkpointing.rules",
                "have patterns that match a layer",
                pattern,
                f"Layers are {paths[0]} to {paths[-1]}" if paths else "This model has no Transformer layers",
            )


def _replace(module: nn.Module, name: str, function: Callable[..., Tensor]) -> None:
    # On the instance: hooks of the module (DeepSpeed's stage 3 gathers parameters in them) stay around it.
    object.__setattr__(module, name, function)


def _recomputed(function: Callable[..., Tensor], *, layer: Layer) -> Callable[..., Tensor]:
    """Returns `function` that keeps its arguments and is called again when its gradient is wanted."""

    @functools.wraps(function)
    def keep_arguments(*arguments: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments, **options)
        # Pipelines go forward with later micro-batches before they come back to this one.
        then = dataclasses.replace(layer.context)

        def compute(*arguments: Any, **options: Any) -> Tensor:
            with _as_it_was(layer, then=then):
                return function(*arguments, **options)

        out: Tensor = checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
        return out

    return keep_arguments


@contextlib.contextmanager
def _as_it_was(layer: Layer, *, then: Any) -> Iterator[None]:
    """Puts the context that all layers share back to what it was, for a while: dropout masks depend on it."""
    now = dataclasses.replace(layer.context)
    vars(layer.context).update(vars(then))
    try:
        yield
    finally:
        vars(layer.context).update(vars(now))


def _offloaded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `function` whose saved tensors wait in host memory; parameters and what is there already stay."""

    @functools.wraps(function)
    def wait_in_host_memory(*arguments: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments, **options)
        with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
            return function(*arguments, **options)

    return wait_in_host_memory


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Returns the tensor's device, and its values in page-locked host memory; a parameter or its view as it is."""
    owner = tensor if tensor._base is None else tensor._base
    if not leaves_device(tensor) or isinstance(owner, nn.Parameter):
        return tensor.device, tensor
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    # Asynchronous, and safe: the memory is given to others only in the order of the same stream.
    waiting.copy_(tensor, non_blocking=True)
    return tensor.device, waiting


def from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    """Returns the values on their device again."""
    device, waiting = packed
    return waiting.to(device, non_blocking=True)


def leaves_device(tensor: Tensor) -> bool:
    """Whether the tensor is somewhere else than in host memory."""
    return tensor.device.type != "cpu"
