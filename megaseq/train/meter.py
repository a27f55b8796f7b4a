"""Training figures, summed from one logging interval to the next."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megaseq.train.engine import StepResult


@dataclasses.dataclass
class Meter:
    """Sums since the last `read`; part of a checkpoint, so that a resumed run logs the same means."""

    sums: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """(sum, weight) by name."""
    grad_norm: float = 0.0
    num_steps: int = 0
    num_skipped: int = 0
    cells: int = 0
    """Positions of source and target rows, padding included."""
    real_cells: int = 0
    target_tokens: float = 0.0
    seconds: float = 0.0
    """Time of the steps, waiting for data included, evaluation and saving not."""
    wait_seconds: float = 0.0
    """Of these, time spent waiting for the next batch."""

    def add(self, result: StepResult, *, cells: Sequence[int], seconds: float, wait_seconds: float) -> None:
        """Adds one optimiser step.

        Args:
            result: of all ranks together.
            cells: positions of the step's rows on all ranks, and how many of them are no padding.
            seconds: of the step.
            wait_seconds: of these, spent waiting for the batch.
        """
        self.num_steps += 1
        self.seconds += seconds
        self.wait_seconds += wait_seconds
        self.cells += cells[0]
        self.real_cells += cells[1]
        self.target_tokens += result.weight
        if result.skipped:
            # Its loss may be NaN and would hide the others'.
            self.num_skipped += 1
            return
        self.grad_norm += result.grad_norm
        for name, (total, weight) in {"loss": (result.loss_sum, result.weight), **result.metrics}.items():
            old_total, old_weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + total, old_weight + weight)

    def read(self, *, device: torch.device) -> dict[str, float]:
        """Returns the figures of the steps since the last call, by their names in the metrics file."""
        figures = {f"train/{name}": total / weight for name, (total, weight) in self.sums.items() if weight > 0}
        applied = self.num_steps - self.num_skipped
        if applied:
            figures["train/grad_norm"] = self.grad_norm / applied
        if self.seconds > 0:
            figures["train/tokens_per_second"] = self.target_tokens / self.seconds
            figures["train/steps_per_second"] = self.num_steps / self.seconds
            figures["train/data_wait_fraction"] = self.wait_seconds / self.seconds
        if self.cells:
            figures["train/padding_fraction"] = 1.0 - self.real_cells / self.cells
        figures["train/memory_gib"] = memory_gib(device)
        self.__init__()  # type: ignore[misc]
        return figures

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of `state_dict` back."""
        for name, value in state.items():
            setattr(self, name, value)
        self.sums = {name: (pair[0], pair[1]) for name, pair in self.sums.items()}


def memory_gib(device: torch.device) -> float:
    """Returns the most memory used so far, in GiB: that of `device` where it is a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
