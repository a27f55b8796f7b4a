"""What `megaseq bench kernels` proves and times of activations: feed-forward blocks of T5 and Transformer-big."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.activation import gated_activation
from megaseq.kernels.activation.configs import configs
from megaseq.kernels.activation.reference import reference_activation
from megaseq.kernels.bench.passes import both_passes, compare_passes, normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a block."""

    name: str
    rows: int
    width: int
    """F of the result."""
    function: str
    gated: bool

    def inputs(self, device: torch.device) -> list[Tensor]:
        """What the projection gave, wanting a gradient."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        return [normal(self.rows, self.width * (1 + self.gated), device=device, dtype=dtype)]

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        return dataclasses.replace(self, rows=64 if on_gpu else 3)


SHAPES = (
    Shape("gated_gelu_t5_large", 16384, 2816, "gelu_new", gated=True),
    Shape("gated_gelu_t5_xl", 16384, 5120, "gelu_new", gated=True),
    Shape("relu_transformer_big", 16384, 4096, "relu", gated=False),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "activation",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"activation": configs(), "activation_backward": configs()},
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Output and gradient beside the reference."""
    shape = shape.small(on_gpu=device.type == "cuda")
    ours, theirs = functools.partial(_ours, shape), functools.partial(_torch, shape)
    return compare_passes(ours, reference=theirs, inputs=shape.inputs(device))


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size; on the host of a small one."""
    shape = shape if device.type == "cuda" else shape.small()
    inputs = shape.inputs(device)
    peers = {"torch": functools.partial(both_passes, functools.partial(_torch, shape), inputs=inputs)}
    # Forward the input and the result; backward the input, the gradient of the result and that of the input.
    moved = (3 * (1 + shape.gated) + 2) * shape.rows * shape.width * inputs[0].element_size()
    run = both_passes(functools.partial(_ours, shape), inputs=inputs)
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85, "torch": 1.0})


def _ours(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    return gated_activation(inputs[0], name=shape.function, gated=shape.gated)


def _torch(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    return reference_activation(inputs[0], name=shape.function, gated=shape.gated)
