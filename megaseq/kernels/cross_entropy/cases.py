"""The calls of the cross entropy that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.cross_entropy.configs import configs, default
from megaseq.kernels.cross_entropy.settings import CrossEntropy
from megaseq.kernels.triton_runtime import Config, override


@dataclass(frozen=True)
class CrossEntropyCase:
    """Sizes and kind of one call."""

    name: str
    count: int = 13
    """Tokens N, every third of which has weight 0."""
    width: int = 6
    """D."""
    num_classes: int = 1500
    """V."""
    settings: CrossEntropy = field(default_factory=CrossEntropy)
    biased: bool = True

    def tensors(self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        """Arguments of the op by name; those of the projection want gradients; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(self.count, generator=generator)
        weights[::3] = 0.0
        hidden, weight = (
            torch.randn(rows, self.width, generator=generator, dtype=torch.float64)
            for rows in (self.count, self.num_classes)
        )
        bias = torch.randn(self.num_classes, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, self.num_classes, (self.count,), generator=generator)
        leaf = {"device": device, "dtype": dtype}
        return {
            "hidden": hidden.to(**leaf).requires_grad_(),  # type: ignore[call-overload]
            "weight": weight.to(**leaf).requires_grad_(),  # type: ignore[call-overload]
            "bias": bias.to(**leaf).requires_grad_() if self.biased else None,  # type: ignore[call-overload]
            "labels": labels.to(device),
            "weights": weights.to(device),
        }


CASES = (
    CrossEntropyCase("plain"),
    CrossEntropyCase("no_bias", biased=False),
    CrossEntropyCase("smoothing", settings=CrossEntropy(label_smoothing=0.1)),
    CrossEntropyCase("smoothing_scale_chunks", settings=CrossEntropy(label_smoothing=0.1, scale=0.3, chunk=4)),
    CrossEntropyCase("z_loss_chunks", settings=CrossEntropy(z_loss=0.01, chunk=4)),
    CrossEntropyCase("all", settings=CrossEntropy(label_smoothing=0.2, z_loss=0.01, soft_cap=1.5, chunk=3)),
    CrossEntropyCase("cap", settings=CrossEntropy(soft_cap=2.0), num_classes=1024),
    CrossEntropyCase("one_token", count=2, num_classes=3),
    CrossEntropyCase("one_class", count=4, num_classes=1),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error of sums and of gradients (as vectors), relative to the reference in float64."""


def compile_cases() -> list[CompileCase]:
    """Every configuration, and every variant with what runs where no table says otherwise."""
    usual = CrossEntropy(label_smoothing=0.1, z_loss=1e-4)
    found = [
        (f"{config.blocks['BLOCK']}_warps{config.num_warps}", config, torch.bfloat16, usual) for config in configs()
    ]
    found += [
        ("float32", default(32000), torch.float32, usual),
        ("float16", default(32000), torch.float16, usual),
        ("plain", default(32000), torch.bfloat16, CrossEntropy()),
        ("cap_smoothing", default(32000), torch.bfloat16, CrossEntropy(label_smoothing=0.1, soft_cap=30.0)),
    ]
    return [
        CompileCase(name, functools.partial(_launch, config=config, dtype=dtype, settings=settings))
        for name, config, dtype, settings in found
    ]


def _launch(*, config: Config, dtype: torch.dtype, settings: CrossEntropy) -> None:
    """Launches all kernels once, over 4 tokens and 32000 classes."""
    from megaseq.kernels.cross_entropy import triton_kernels

    logits, weights = torch.zeros(4, 32000, dtype=dtype), torch.ones(4)
    labels, parts = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4)
    with override(cross_entropy=config, cross_entropy_part=config, cross_entropy_gradient=config):
        for graded in (True, False):
            triton_kernels.launch_whole(
                logits, labels=labels, weights=weights, parts=parts, settings=settings, graded=graded
            )
        triton_kernels.launch_part(logits, labels=labels, parts=parts, first=16, settings=settings)
        triton_kernels.launch_gradient(
            logits, labels=labels, weights=weights, lse=weights, first=16, share=1e-6, settings=settings
        )
