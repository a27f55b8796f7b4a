"""The calls of the activations that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.activation.configs import configs, default
from megaseq.kernels.activation.reference import FUNCTIONS, SAME
from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.triton_runtime import Config, override


@dataclass(frozen=True)
class ActivationCase:
    """Sizes and kind of one call."""

    name: str
    gated: bool
    shape: tuple[int, ...] = (2, 3, 300)
    """Of the result."""
    strided: bool = False

    def tensor(self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
        """The input, wanting a gradient, with values far from zero too; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        width = self.shape[-1] * (1 + self.gated)
        wide = torch.randn(*self.shape[:-1], 2 * width, generator=generator, dtype=torch.float64) * 2
        wide[..., :: max(1, width // 3)] *= 10
        narrow = wide.to(device=device, dtype=dtype)[..., width // 2 : width // 2 + width]
        return (narrow if self.strided else narrow.contiguous()).requires_grad_()


CASES = (
    *(ActivationCase(name, gated=False, shape=(5, 70)) for name in FUNCTIONS),
    *(ActivationCase(name, gated=True) for name in FUNCTIONS),
    ActivationCase("silu", gated=True, strided=True, shape=(2, 7, 33)),
    ActivationCase("gelu", gated=False, strided=True, shape=(9, 1)),
    ActivationCase("relu", gated=True, shape=(1, 2100)),
    ActivationCase("gelu_tanh", gated=True, shape=(0, 8)),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error of result and gradient (as vectors), relative to the reference in float64."""


def compile_cases() -> list[CompileCase]:
    """Every configuration, and every function with what runs where no table says otherwise."""
    found = [
        (f"{config.blocks['BLOCK']}_warps{config.num_warps}", config, torch.bfloat16, "silu") for config in configs()
    ]
    found += [(name, default(4096), torch.bfloat16, name) for name in FUNCTIONS if name not in SAME]
    found += [("float32", default(4096), torch.float32, "gelu"), ("float16", default(4096), torch.float16, "gelu")]
    return [
        CompileCase(case, functools.partial(_launch, config=config, dtype=dtype, name=name, plain=case == name))
        for case, config, dtype, name in found
    ]


def _launch(*, config: Config, dtype: torch.dtype, name: str, plain: bool) -> None:
    """Launches both kernels, gated and, if wanted, plain."""
    from megaseq.kernels.activation.op import launch_backward, launch_forward

    hidden, out = torch.zeros(2, 8192, dtype=dtype), torch.zeros(2, 4096, dtype=dtype)
    with override(activation=config, activation_backward=config):
        for gated, result in ((True, out), (False, hidden))[: 1 + plain]:
            launch_forward(hidden, name=name, gated=gated, out=result)
            launch_backward(result, hidden=hidden, name=name, gated=gated, out=hidden)
