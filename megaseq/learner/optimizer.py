"""What every optimizer is: an in-place update of groups of parameters, with named slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.base import Configurable
from megaseq.base.errors import CheckpointError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a learning-rate scale."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    weight_decay: float
    learning_rate_scale: float
    zeros: Callable[[Tensor], Tensor] = torch.zeros_like
    """Makes what is kept beside a parameter, of its shape: moments and averages."""


class Optimizer(Configurable):
    """Updates fp32 parameters in place from their gradients.

    A subclass allocates its slots (moments) in `__init__` with `add_slot` and changes parameters and slots only in
    `step`. All of them live under the parameter's logical name, so that a checkpoint does not know how parameters were
    grouped or sharded.
    """

    class Params(Configurable.Params):
        """An optimizer without params of its own."""

    params: Params

    def __init__(self, p: Params, *, groups: Sequence[ParameterGroup]) -> None:
        """Keeps the groups; all parameters must be on one device."""
        super().__init__(p)
        self.groups = tuple(groups)
        self.num_updates = 0
        """How many updates were applied; skipped ones do not count, so bias correction is that of the moments."""
        self._slots: dict[str, dict[str, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        for group in self.groups:
            return group.tensors[0].device
        return torch.device("cpu")

    def add_slot(self, slot: str, name: str, tensor: Tensor) -> Tensor:
        """Registers the state `tensor` of the parameter `name` under `slot`; returns it."""
        self._slots.setdefault(slot, {})[name] = tensor
        return tensor

    def add_zeros(self, slot: str) -> list[list[Tensor]]:
        """Registers zeros like every parameter under `slot`; returns them group by group."""
        return [
            [
                self.add_slot(slot, name, group.zeros(tensor))
                for name, tensor in zip(group.names, group.tensors, strict=True)
            ]
            for group in self.groups
        ]

    @torch.no_grad()
    def update(
        self, *, gradients: Sequence[Sequence[Tensor]], learning_rate: float, gradient_scale: float = 1.0
    ) -> None:
        """Makes one update.

        Args:
            gradients: One a parameter, group by group; consumed, that is, their contents afterwards are undefined.
            learning_rate: Of this update, before the groups' scales.
            gradient_scale: Multiplied into every gradient: normalisation times clipping.
        """
        self.num_updates += 1
        for index, row in enumerate(gradients):
            self.step(index, gradients=row, learning_rate=learning_rate, gradient_scale=gradient_scale)

    def step(self, index: int, *, gradients: Sequence[Tensor], learning_rate: float, gradient_scale: float) -> None:
        """Updates parameters and slots of the group `index`; `self.num_updates` counts this update already."""
        raise NotImplementedError(f"{type(self).__name__}: must define step()")

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the slots as `<slot>.<parameter name>`: the tensors themselves, not copies."""
        return {f"{slot}.{name}": tensor for slot, items in self._slots.items() for name, tensor in items.items()}


@torch.no_grad()
def copy_named(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, what: str) -> None:
    """Copies the tensors of `given` into those of the same name in `own`.

    Raises:
        CheckpointError: When names, shapes or types differ; nothing was copied then.
    """
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        listing = "; ".join(
            f"{len(names)} {word}, first {names[0]}"
            for word, names in (("missing", missing), ("unknown", unknown))
            if names
        )
        raise CheckpointError(
            f"{what}: must have the same names as this learner's, but {listing}. Resume with the params of the run."
        )
    for name, tensor in own.items():
        other = given[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{what} {name}: must be {tensor.dtype} {list(tensor.shape)}, but is {other.dtype} "
                f"{list(other.shape)}. "
                "Resume with the params of the run."
            )
    for name, tensor in own.items():
        if given[name] is not tensor:
            tensor.copy_(given[name])
