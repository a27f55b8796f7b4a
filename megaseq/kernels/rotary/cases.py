"""The calls of rotary positions that tests prove and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.rotary.configs import configs, default
from megaseq.kernels.triton_runtime import Config, override


@dataclass(frozen=True)
class RotaryCase:
    """Sizes and layout of one call."""

    name: str
    batch: int = 2
    length: int = 5
    num_heads: int = 3
    head_dim: int = 16
    width: int = 16
    """Turned elements R of a head."""
    interleaved: bool = False
    shared: bool = False
    """All rows have the same angles."""

    def tensors(self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, a slice of the heads of a wider tensor, wanting a gradient; cosines and sines of pairs, rounded to `dtype`
        so that all implementations turn by the same angles."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.length, 2 * self.num_heads, self.head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
        rows = 1 if self.shared else self.batch
        angles = torch.randn(rows, self.length, self.width // 2, generator=generator, dtype=torch.float64) * 3
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat([angles, angles], dim=-1)
        angles = angles.unsqueeze(2).to(device)
        return x[:, :, self.num_heads :].requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


_SIZES = (
    RotaryCase("whole"),
    RotaryCase("part", head_dim=10, width=6, shared=True),
    RotaryCase("many_heads", num_heads=19, length=2, head_dim=64, width=32),
    RotaryCase("one_pair", batch=1, length=1, num_heads=1, head_dim=2, width=2),
    RotaryCase("decode_step", batch=4, length=1, shared=True),
    RotaryCase("no_rows", batch=0),
)
CASES = (
    *_SIZES,
    *(dataclasses.replace(case, name=f"{case.name}_interleaved", interleaved=True) for case in _SIZES),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error of result and gradient (as vectors), relative to the reference in float64."""


def compile_cases() -> list[CompileCase]:
    """Every configuration with every layout, and every dtype with what runs where no table says otherwise."""
    found: list[tuple[str, Config, torch.dtype, tuple[bool, ...]]] = [
        (f"{config.blocks['HEADS']}_warps{config.num_warps}", config, torch.bfloat16, (False,)) for config in configs()
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found.append((str(dtype).removeprefix("torch."), default(), dtype, (False, True)))
    return [
        CompileCase(name, functools.partial(_launch, config=config, dtype=dtype, inverses=inverses))
        for name, config, dtype, inverses in found
    ]


def _launch(*, config: Config, dtype: torch.dtype, inverses: tuple[bool, ...]) -> None:
    """Launches the kernel for whole heads and parts of them, in both layouts."""
    from megaseq.kernels.rotary.op import launch

    x = torch.zeros(1, 2, 32, 64, dtype=dtype)
    with override(rotary=config):
        for interleaved, inverse, width in product((False, True), inverses, (32, 64)):
            angles = torch.zeros(1, 2, 1, width)
            launch(x, cosines=angles, sines=angles, interleaved=interleaved, inverse=inverse, out=torch.empty_like(x))
