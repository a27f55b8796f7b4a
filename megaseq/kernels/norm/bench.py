"""What `megaseq bench kernels` proves and times of norms: training steps of T5, with and without the sum before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import both_passes, compare_passes, normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.norm import NormKind, add_norm, apex, norm
from megaseq.kernels.norm.configs import configs
from megaseq.kernels.norm.reference import reference_norm


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a layer."""

    name: str
    rows: int
    width: int
    centred: bool = False
    summed: bool = False

    @property
    def kind(self) -> NormKind:
        """Which norm."""
        return NormKind(1e-6, centred=self.centred)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Weight [D] (and bias [D]), x [R, D] (and residual [R, D]), which want gradients."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        vectors = [normal(self.width, device=device, dtype=dtype, seed=seed) for seed in range(1 + self.centred)]
        rows = [normal(self.rows, self.width, device=device, dtype=dtype, seed=2 + s) for s in range(1 + self.summed)]
        return [*rows, *vectors]

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        return dataclasses.replace(self, rows=2048 if on_gpu else 9)

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """x, residual, weight, bias."""
        x, *others = inputs
        residual = others.pop(0) if self.summed else None
        return x, residual, others[0], others[1] if self.centred else None


SHAPES = (
    Shape("rms_t5_large", 16384, 1024),
    Shape("rms_add_t5_large", 16384, 1024, summed=True),
    Shape("rms_add_t5_xl", 16384, 2048, summed=True),
    Shape("layer_transformer_big", 16384, 1024, centred=True),
    Shape("layer_add_transformer_big", 16384, 1024, centred=True, summed=True),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "norm",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"norm": configs(shape.width), "norm_backward": configs(shape.width)},
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Outputs and gradients beside the reference."""
    shape = shape.small(on_gpu=device.type == "cuda")
    ours, theirs = functools.partial(_ours, shape), functools.partial(_reference, shape)
    return compare_passes(ours, reference=theirs, inputs=shape.inputs(device))


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size; on the host of a small one."""
    shape = shape if device.type == "cuda" else shape.small()
    inputs = shape.inputs(device)
    peers = {"torch": functools.partial(both_passes, functools.partial(_torch, shape), inputs=inputs)}
    if not shape.summed and device.type == "cuda" and apex.missing() is None:
        peers["apex"] = functools.partial(both_passes, functools.partial(_apex, shape), inputs=inputs)
    # Forward x and y, with the sum the residual and the total too; backward the gradients of these, and x or total.
    tensors = 4 + 4 if shape.summed else 2 + 3
    moved = tensors * inputs[0].numel() * inputs[0].element_size()
    run = both_passes(functools.partial(_ours, shape), inputs=inputs)
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85})


def _ours(shape: Shape, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, residual, weight, bias = shape.arguments(inputs)
    if residual is None:
        return (norm(x, weight=weight, bias=bias, kind=shape.kind),)
    return add_norm(x, residual=residual, weight=weight, bias=bias, kind=shape.kind)


def _reference(shape: Shape, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, residual, weight, bias = shape.arguments(inputs)
    total = x if residual is None else residual + x
    y = reference_norm(total, weight=weight, bias=bias, kind=shape.kind)
    return (y,) if residual is None else (y, total)


def _torch(shape: Shape, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, residual, weight, bias = shape.arguments(inputs)
    total = x if residual is None else residual + x
    if shape.centred:
        y = torch.layer_norm(total, weight.shape, weight, bias, shape.kind.eps)
    else:
        y = torch.rms_norm(total, weight.shape, weight, shape.kind.eps)
    return (y,) if residual is None else (y, total)


def _apex(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    x, _, weight, bias = shape.arguments(inputs)
    return apex.apex_norm(x, weight=weight, bias=bias, kind=shape.kind)
