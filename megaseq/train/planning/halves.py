"""Backward passes in two halves, as zero-bubble schedules have them: what lies between these, and how many wait so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaseq.train.planning.live_memory import LiveMemory


@dataclasses.dataclass(frozen=True)
class Moment:
    """A backward pass of a pipe rank that may be where most is alive."""

    stage: int
    """Of the rank's two: 0 on the way down the V, 1 on the way up."""
    alive: tuple[int, int]
    """Micro-batches of which each stage has activations, the one whose pass it is included."""
    between: tuple[int, int]
    """Of them, those of which the first half is done and the second is not."""
    done: tuple[int, int]
    """Micro-batches of which the first half is done or goes on, all of the step."""


def moments(rank: int, *, ranks: int, micro_batches: int) -> tuple[Moment, ...]:
    """Returns where most may be alive on a rank of a V of zero bubbles (Qi et al. 2024).

    Until the last stage gives its first gradient, and from then on, stages of 2 `ranks` micro-batches in all are
    alive: of the first stage as many as it can be ahead of the last one. Second halves follow the first at once, until
    there are no forward passes any more to fill the gaps: then a rank has `rank` of each stage between halves.
    """

    def at_most(count: int) -> int:
        return min(micro_batches, count)

    full = min(micro_batches, 2 * ranks - rank)
    down = Moment(
        0,
        alive=(full, at_most(rank)),
        between=(0, 0),
        done=(micro_batches - full + 1, at_most(max(ranks - rank, micro_batches - ranks))),
    )
    up = Moment(
        1,
        alive=(at_most(2 * ranks - rank - 1), at_most(rank + 1)),
        between=(0, 0),
        done=(micro_batches - full + 1, at_most(max(ranks - rank, micro_batches - ranks + 1))),
    )
    waiting = at_most(rank)
    last = Moment(
        0,
        alive=(at_most(ranks), waiting),
        between=(waiting, waiting),
        done=(micro_batches - at_most(ranks) + waiting + 1, micro_batches),
    )
    return down, up, last


def first_half(outputs: Sequence[Tensor], *, inputs: Sequence[Tensor], memory: LiveMemory) -> tuple[int, int]:
    """Computes the gradients of `inputs` alone; returns what that leaves for the second half, and its peak, in bytes.

    The graph stays, with all that it keeps. Left are the gradients of what is computed with parameters: they are what
    those of the parameters are made of.
    """
    roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
    makers = _makers(roots, inputs=inputs)
    if not makers:
        return 0, 0
    held: list[Any] = []
    handles = [node.register_prehook(held.append) for node in makers]
    gradients = [torch.empty_like(output) for output in outputs]
    start = memory.reset_peak()
    found = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    peak = memory.peak - start
    for handle in handles:
        handle.remove()
    # What goes to the stage before does not stay, unless something else does in the same memory.
    del found
    left = memory.current - start
    held.clear()
    return max(0, left), peak


def _makers(roots: Sequence[Any], *, inputs: Sequence[Tensor]) -> list[Any]:
    """Returns the nodes between `roots` and `inputs` that read something that leads to parameters alone."""
    targets = {_end_of(value) for value in inputs}
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    inner: set[Any] = set()
    for node in order:  # What is nearest to the inputs comes first.
        if node in targets or any(child in inner for child, _ in node.next_functions):
            inner.add(node)
    return [
        node
        for node in order
        if node in inner and any(child is not None and child not in inner for child, _ in node.next_functions)
    ]


def _end_of(leaf: Tensor) -> Any:
    """Returns the node of the graph at which the gradient of a leaf arrives."""
    with torch.enable_grad():
        made: Any = leaf.view_as(leaf).grad_fn
    return made.next_functions[0][0]
