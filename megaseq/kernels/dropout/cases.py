"""The calls of dropout that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product

import torch

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.dropout.configs import configs, default
from megaseq.kernels.triton_runtime import Config, override


@dataclass(frozen=True)
class DropoutCase:
    """Sizes and place of one call."""

    name: str
    shape: tuple[int, ...]
    rate: float = 0.3
    start: int = 0
    """Number of the first element."""
    runs: tuple[int, ...] = ()
    """Numbers of the first elements of runs, instead."""

    def offset(self, *, device: str = "cpu") -> int | torch.Tensor:
        """What the op is told of the place."""
        return torch.tensor(self.runs, device=device) if self.runs else self.start


CASES = (
    DropoutCase("several_blocks", (3, 700)),
    DropoutCase("one_element", (1,), start=2**32 - 1, rate=0.9),
    DropoutCase("high_word_changes_inside", (1500,), start=2**32 - 700),
    DropoutCase("far_away", (70,), start=2**40 + 3),
    DropoutCase("runs", (4, 33), runs=(7, 2**33 - 5, 3, 2**32 - 7)),
    DropoutCase("runs_of_one", (3,), runs=(5, 2**35, 1), rate=0.5),
    DropoutCase("wide_runs", (2, 1, 1100), runs=(2**31 - 9, 12)),
    DropoutCase("empty", (0, 4)),
)


def compile_cases() -> list[CompileCase]:
    """Every configuration with all there is, and every variant with what runs where no table says otherwise."""
    found = [
        (f"{config.blocks['BLOCK']}_warps{config.num_warps}", config, torch.bfloat16, True, True)
        for config in configs()
    ]
    for dtype, residual, runs in product((torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True)):
        name = str(dtype).removeprefix("torch.") + "_residual" * residual + "_runs" * runs
        found.append((name, default(8192), dtype, residual, runs))
    cases = [
        CompileCase(name, functools.partial(_launch, config=config, dtype=dtype, residual=residual, runs=runs))
        for name, config, dtype, residual, runs in found
    ]
    onto_float32 = functools.partial(
        _launch, config=default(8192), dtype=torch.bfloat16, residual=True, runs=True, stream=torch.float32
    )
    return [*cases, CompileCase("bfloat16_onto_float32", onto_float32)]


def _launch(
    *, config: Config, dtype: torch.dtype, residual: bool, runs: bool, stream: torch.dtype | None = None
) -> None:
    """Launches the kernel once; `stream` is the dtype of the residual where it is another."""
    from megaseq.kernels.dropout import triton_kernels

    values, sums = torch.zeros(2, 8192, dtype=dtype), torch.zeros(2, 8192, dtype=stream or dtype)
    with override(dropout=config):
        triton_kernels.launch(
            values,
            residual=sums if residual else None,
            out=sums,
            runs=torch.zeros(2, dtype=torch.int64) if runs else None,
            start=0,
            key=12345,
            threshold=2**31,
            scale=2.0,
        )
