"""The calls of AdamW that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.adamw.configs import configs
from megaseq.kernels.adamw.settings import AdamWSettings, Segments
from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.triton_runtime import override


@dataclass(frozen=True)
class AdamWCase:
    """Sizes and kind of one call."""

    name: str
    count: int = 3000
    beta1: float = 0.9
    weight_decay: float = 0.1
    ends: tuple[int, ...] = ()
    """Of segments, every other one of which is decayed."""
    gradients: torch.dtype = torch.float32
    divisor: float | None = None
    skip: float | None = None
    copy: torch.dtype | None = None

    def settings(self, *, device: torch.device) -> AdamWSettings:
        """The numbers of the update."""
        decay: float | Segments = self.weight_decay
        if self.ends:
            decays = [self.weight_decay * (index % 2) for index in range(len(self.ends))]
            decay = Segments(torch.tensor(self.ends, device=device), torch.tensor(decays, device=device))
        return AdamWSettings(1e-3, self.beta1, 0.98, 1e-9, decay)

    def tensors(self, *, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Parameters, gradients, moments; fresh ones at each call."""
        generator = torch.Generator().manual_seed(seed)
        p, g, m, v = (torch.randn(self.count, generator=generator).to(device) for _ in range(4))
        return p, g.to(self.gradients), (m * 0.1, v.square() * 0.1)


CASES = (
    AdamWCase("plain"),
    AdamWCase("no_decay", weight_decay=0.0),
    AdamWCase("far_from_the_gradient", beta1=0.3),
    AdamWCase("scaled", divisor=3.7),
    AdamWCase("bf16_gradients_and_copy", gradients=torch.bfloat16, divisor=0.3, copy=torch.bfloat16),
    AdamWCase("fp16_copy", copy=torch.float16, skip=0.0),
    AdamWCase("skipped", skip=1.0, copy=torch.bfloat16),
    AdamWCase("segments", ends=(1, 7, 7, 1024, 1500, 2049, 2999, 3000), copy=torch.bfloat16),
    AdamWCase("one_segment", ends=(3000,)),
    AdamWCase("one_element", count=1),
    AdamWCase("nothing", count=0),
)


def compile_cases() -> list[CompileCase]:
    """Every tile; every kind of call."""
    return [CompileCase(name=case.name, run=functools.partial(_compile, case)) for case in CASES if case.count > 1]


def _compile(case: AdamWCase) -> None:
    from megaseq.kernels.adamw.op import launch

    cpu = torch.device("cpu")
    parameters, gradients, moments = case.tensors(device=cpu)
    for tile in configs() if case.name == "plain" else configs()[:1]:
        with override(adamw=tile):
            launch(
                parameters,
                gradients=gradients,
                moments=moments,
                settings=case.settings(device=cpu),
                step=torch.ones(()),
                divisor=None if case.divisor is None else torch.ones(()),
                skip=None if case.skip is None else torch.ones(()),
                copy=None if case.copy is None else torch.empty(case.count, dtype=case.copy),
            )
