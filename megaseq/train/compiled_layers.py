"""torch.compile, one Transformer layer at a time: as much is fused, and a twelfth of the code is compiled."""

from __future__ import annotations

import torch
from torch import nn

from megaseq.layers.attention import Attention
from megaseq.layers.base import Layer
from megaseq.layers.transformer import TransformerLayer


def compile_layers(module: nn.Module) -> int:
    """Makes every Transformer layer of `module` compile itself at its first call; returns how many there are.

    A second shape makes the sizes symbolic, so that batches of all lengths share that code. Attention and dropout stay
    our own kernels: they are called between the compiled pieces, and the key of a dropout, which changes every step,
    is no constant of the code.

    To be called before `checkpoint_activations`, which wraps the compiled forward pass.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, TransformerLayer)]
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, Layer):
                _keep_whole(part)
        object.__setattr__(layer, "forward", torch.compile(layer.forward))
    return len(layers)


def _keep_whole(part: Layer) -> None:
    names = ["drop", "drop_add"] + (["attend"] if isinstance(part, Attention) else [])
    for name in names:
        object.__setattr__(part, name, torch.compiler.disable(getattr(part, name)))  # type: ignore[no-untyped-call]
