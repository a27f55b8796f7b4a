"""Gradients of tensors that several pipeline stages hold, where DeepSpeed reduces those of one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megaseq.parallel.gradients import sum_over
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import TiedTensors


class TiedGradients:
    """Sums gradients of tied tensors over the stages that hold them.

    Stage 1 of ZeRO reduces when all micro-batches are done, so that they are summed before. Stage 2 reduces, and lets
    go of, a gradient in each backward pass, and what a rank has left of it lies elsewhere in each stage: these
    gradients are kept here instead, DeepSpeed sees zeros.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, mesh: Mesh | None, kept: bool) -> None:
        """Finds the tied tensors; all ranks at the same time.

        Args:
            parameters: that train, by logical name; before DeepSpeed hangs its hooks on them.
            mesh: None is one process.
            kept: whether DeepSpeed must not see their gradients.
        """
        self._ties = TiedTensors(parameters, mesh=mesh)
        self._group = mesh.group("data", "context") if mesh is not None else None
        self._parameters = {name: parameters[name] for name in sorted(self._ties.names)}
        self.kept: dict[str, Tensor] = {}
        """Sums so far of gradients, fp32, by name."""
        if kept:
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(self._keeper(name))  # type: ignore[no-untyped-call]

    def _keeper(self, name: str) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name not in self.kept:
                self.kept[name] = torch.zeros_like(parameter, dtype=torch.float32)
            self.kept[name] += parameter.grad
            parameter.grad.zero_()

        return keep

    def sum_kept(self) -> None:
        """Sums what was kept over stages and data-parallel ranks."""
        for name, parameter in self._parameters.items():
            if name not in self.kept:
                self.kept[name] = torch.zeros_like(parameter, dtype=torch.float32)
        self._ties.sum(self.kept)
        ordered = [self.kept[name] for name in self._parameters]
        sum_over(ordered, group=self._group, bucket_elements=sum(tensor.numel() for tensor in ordered) or 1)

    def sum_gradients(self, gradient_of: Callable[[Tensor], Tensor | None]) -> None:
        """Sums over stages what `gradient_of` returns of each tied parameter, in place."""
        found = {name: gradient_of(parameter) for name, parameter in self._parameters.items()}
        missing = sorted(name for name, gradient in found.items() if gradient is None)
        if missing:
            raise RuntimeError(f"tied parameters without a gradient on this stage: {', '.join(missing)}")
        self._ties.sum({name: gradient for name, gradient in found.items() if gradient is not None})

    def clear(self) -> None:
        """Forgets what was kept."""
        self.kept = {}
