"""The exponential moving average of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megaseq.base import Configurable, Problem


class MovingAverage(Configurable):
    """average = decay * average + (1 - decay) * parameter, after every update that was applied.

    With `warm_up` the decay of update s (0 is the first) is min((1 + s) / (10 + s), decay), so that the start of the
    run is forgotten quickly. The averages live on the parameters' device.
    """

    class Params(Configurable.Params):
        decay: float = 0.9999
        """Share of the old average that is kept at each update."""
        warm_up: bool = True
        """Whether the decay is limited by (1 + s) / (10 + s) at first."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a decay outside [0, 1)."""
            yield from super().validate()
            if not 0.0 <= self.decay < 1.0:
                yield f"decay: must be in [0, 1), but is {self.decay}. Typical values are 0.999 to 0.9999."

    params: Params

    def __init__(
        self,
        p: Params,
        *,
        named_parameters: Mapping[str, Tensor],
        zeros: Callable[[Tensor], Tensor] = torch.zeros_like,
    ) -> None:
        """Starts the averages at the parameters' values.

        Args:
            p: of the average.
            named_parameters: those that train.
            zeros: makes the tensor of an average.
        """
        super().__init__(p)
        self._parameters = list(named_parameters.values())
        self._averages = [zeros(parameter.detach()).copy_(parameter.detach()) for parameter in self._parameters]
        self._names = list(named_parameters)
        self._scratch: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name; the tensors themselves, not copies."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the averages to the parameters as they are now."""
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.copy_(parameter)

    def decay(self, num_updates: int) -> float:
        """Returns the decay of the update before which `num_updates` were applied."""
        if not self.params.warm_up:
            return self.params.decay
        return min((1 + num_updates) / (10 + num_updates), self.params.decay)

    @torch.no_grad()
    def update(self, *, num_updates: int, names: Sequence[str] | None = None) -> None:
        """Moves the averages towards the parameters as they are now.

        Args:
            num_updates: that were applied before this one.
            names: of the parameters whose averages are moved; None is all.
        """
        averages, parameters = self._averages, self._parameters
        if names is not None:
            places = [self._names.index(name) for name in names]
            averages, parameters = [averages[i] for i in places], [parameters[i] for i in places]
        if averages:
            torch._foreach_lerp_(averages, parameters, 1.0 - self.decay(num_updates))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the contents of parameters and averages; a second call puts both back, bit by bit.

        Contents and not pointers are exchanged, because others hold views of the parameters.
        """
        if not self._averages:
            return
        if self._scratch is None:
            largest = max(self._averages, key=lambda tensor: tensor.numel())
            self._scratch = torch.empty_like(largest).flatten()
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            kept = self._scratch[: parameter.numel()].view(parameter.shape).copy_(parameter)
            parameter.copy_(average)
            average.copy_(kept)
