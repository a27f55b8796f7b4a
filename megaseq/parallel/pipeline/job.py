"""What one optimiser step puts through a pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megaseq.parallel.spec import Added

Shapes = Mapping[str, tuple[int, int]]
"""(rows, tokens) of the activations of a micro-batch on this rank, by the name of the flow."""


class LossSums(Protocol):
    """What a model's `output_of` returns, as far as a pipeline reads it."""

    @property
    def loss_sum(self) -> Tensor:
        """Scalar that is differentiated."""


def _nothing(index: int) -> None:
    return None


def _no_context() -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def _ignore() -> None:
    return None


@dataclasses.dataclass(eq=False)
class PipelineJob:
    """The micro-batches of a step, all of one shape, and what is to be done around them."""

    batches: Sequence[Any]
    """Every rank of the pipeline has all of them."""
    shapes: Shapes
    """Of each micro-batch's activations on this rank."""
    dtype: torch.dtype
    """Of activations between stages."""
    scale: Tensor | None = None
    """Factor of the summed loss before it is differentiated; None: 1."""
    before_forward: Callable[[int], None] = _nothing
    """Called with the index of the micro-batch before each forward pass of a stage."""
    forward_context: Callable[[], contextlib.AbstractContextManager[object]] = _no_context
    """Gives what a forward pass runs in, autocast, say."""
    before_backward: Callable[[], None] = _ignore
    """Called before each backward pass of a stage."""
    after_backward: Callable[[], None] = _ignore
    """Called when a stage's backward pass of a micro-batch has left gradients of parameters."""
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)
    """What the last stage made of each micro-batch, by index; filled on the rank that has it."""
    added: list[Added] = dataclasses.field(default_factory=list)
    """What layers of this rank's other stages added to the loss, without gradient."""
