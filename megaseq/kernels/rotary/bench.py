"""What `megaseq bench kernels` proves and times of rotary positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import both_passes, compare_passes, normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.rotary import rotate
from megaseq.kernels.rotary.configs import configs
from megaseq.kernels.rotary.reference import reference_rotate


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of a layer."""

    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    interleaved: bool = False

    def inputs(self, device: torch.device) -> list[Tensor]:
        """x [B, T, N, H], wanting a gradient; cosines and sines [B, T, 1, H], the same for both of a pair."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        half = self.head_dim // 2
        rates = 10_000.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.arange(self.length, device=device)[:, None] * rates
        paired = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 2)
        paired = paired[None, :, None].expand(self.batch, -1, -1, -1)
        x = normal(self.batch, self.length, self.heads, self.head_dim, device=device, dtype=dtype)
        return [x, paired.cos().to(dtype), paired.sin().to(dtype)]

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        if on_gpu:
            return dataclasses.replace(self, batch=2, length=64)
        return dataclasses.replace(self, batch=2, length=5, heads=3)


SHAPES = (
    Shape("halves", 8, 2048, 16, 64),
    Shape("halves_head_128", 8, 2048, 16, 128),
    Shape("interleaved", 8, 2048, 16, 64, interleaved=True),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "rotary",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"rotary": configs()},
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
    run = both_passes(functools.partial(_ours, shape), inputs=inputs)
    moved = 4 * inputs[0].numel() * inputs[0].element_size()
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85, "torch": 1.0})


def _ours(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    return rotate(inputs[0], cosines=inputs[1], sines=inputs[2], interleaved=shape.interleaved)


def _torch(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    return reference_rotate(inputs[0], cosines=inputs[1], sines=inputs[2], interleaved=shape.interleaved)
