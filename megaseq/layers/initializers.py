"""First values of parameters, each a small Configurable, so that an experiment can swap one for another by value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from megaseq.base import Configurable
from megaseq.parallel.spec import Axis

# A unit normal cut at two standard deviations has this standard deviation; dividing by it restores the one asked for.
_TRUNCATED_STD = 0.87962566103423978


class Initializer(Configurable):
    """Fills a parameter; weights are laid out as [output, input], as torch.nn.functional.linear wants them."""

    class Params(Configurable.Params):
        pass

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Overwrites the float32 CPU `tensor`; see `megaseq.parallel.spec.Fill`."""
        raise NotImplementedError


def fans(tensor: Tensor) -> tuple[int, int]:
    """Returns (fan in, fan out) of a weight [output, input]; a vector counts as one input for each output."""
    if tensor.dim() < 2:
        return 1, tensor.numel()
    receptive = math.prod(tensor.shape[2:])
    return tensor.shape[1] * receptive, tensor.shape[0] * receptive


class Constant(Initializer):
    """The same value everywhere."""

    class Params(Initializer.Params):
        value: float = 0.0
        """What every element becomes."""

    params: Params

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Sets every element of `tensor` to `value`."""
        tensor.fill_(self.params.value)


class Gaussian(Initializer):
    """Independent normal values with mean 0."""

    class Params(Initializer.Params):
        std: float = 0.02
        """Standard deviation."""

        def validate(self) -> Iterator[str]:
            """Refuses a negative deviation."""
            if self.std < 0:
                yield f"std: must be at least 0, but is {self.std}. Give a positive deviation."

    params: Params

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Draws `tensor` from N(0, std^2)."""
        tensor.normal_(0.0, self.params.std, generator=generator)


class ScaledInitializer(Initializer):
    """Base of those whose variance is `gain`^2 / fan (Glorot and Bengio 2010; He et al. 2015)."""

    class Params(Initializer.Params):
        gain: float = 1.0
        """Multiplies the standard deviation."""
        fan: Literal["in", "out", "average"] = "in"
        """Which width the variance is divided by; `in` is the number of inputs of a linear map."""

        def validate(self) -> Iterator[str]:
            """Refuses a negative gain."""
            if self.gain < 0:
                yield f"gain: must be at least 0, but is {self.gain}. Give a positive gain."

    params: Params

    def std(self, tensor: Tensor) -> float:
        """Returns the standard deviation that `tensor` [output, input] gets."""
        fan_in, fan_out = fans(tensor)
        fan = {"in": float(fan_in), "out": float(fan_out), "average": (fan_in + fan_out) / 2}[self.params.fan]
        return float(self.params.gain / math.sqrt(max(fan, 1.0)))


class ScaledGaussian(ScaledInitializer):
    """Normal values with variance `gain`^2 / fan."""

    class Params(ScaledInitializer.Params):
        pass

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Draws `tensor` from N(0, gain^2 / fan)."""
        tensor.normal_(0.0, self.std(tensor), generator=generator)


class TruncatedGaussian(ScaledInitializer):
    """Normal values cut at two standard deviations, widened so that the variance is still `gain`^2 / fan."""

    class Params(ScaledInitializer.Params):
        pass

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Draws `tensor` by the inverse of the normal distribution function on a uniform sample."""
        scale = self.std(tensor) / _TRUNCATED_STD
        edge = math.erf(2.0 / math.sqrt(2.0))
        tensor.uniform_(-edge, edge, generator=generator)
        tensor.erfinv_().mul_(scale * math.sqrt(2.0)).clamp_(-2.0 * scale, 2.0 * scale)


class ScaledUniform(ScaledInitializer):
    """Uniform values with variance `gain`^2 / fan; with `fan` = `average` they are Xavier's."""

    class Params(ScaledInitializer.Params):
        fan: Literal["in", "out", "average"] = "average"
        """Which width the variance is divided by; `average` of both is Xavier's."""

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Draws `tensor` from U(-a, a) with a = sqrt(3) * std."""
        edge = math.sqrt(3.0) * self.std(tensor)
        tensor.uniform_(-edge, edge, generator=generator)
