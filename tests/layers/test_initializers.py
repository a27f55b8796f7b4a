"""First values have the moments that their params ask for."""

from __future__ import annotations

import math

import pytest
import torch

from megaseq.base import ParamsError
from megaseq.layers.initializers import (
    Constant,
    Gaussian,
    Initializer,
    ScaledGaussian,
    ScaledUniform,
    TruncatedGaussian,
)


def fill(params: Initializer.Params, *, shape: tuple[int, ...] = (400, 600)) -> torch.Tensor:
    """Returns a filled tensor."""
    tensor = torch.empty(shape)
    params.instantiate().fill(tensor, generator=torch.Generator().manual_seed(1), axes=("hidden", "model"))
    return tensor


@pytest.mark.parametrize(
    ("params", "std"),
    [
        (Gaussian.Params(std=0.3), 0.3),
        (ScaledGaussian.Params(), 600**-0.5),
        (ScaledGaussian.Params(fan="out", gain=2.0), 2 * 400**-0.5),
        (TruncatedGaussian.Params(), 600**-0.5),
        (TruncatedGaussian.Params(fan="average"), 500**-0.5),
        (ScaledUniform.Params(), 500**-0.5),
        (ScaledUniform.Params(fan="in"), 600**-0.5),
    ],
)
def test_mean_and_deviation(params: Initializer.Params, std: float) -> None:
    tensor = fill(params)
    assert abs(float(tensor.mean())) < 5 * std / math.sqrt(tensor.numel())
    assert float(tensor.std()) == pytest.approx(std, rel=0.01)


def test_truncated_values_stop_at_two_deviations() -> None:
    tensor = fill(TruncatedGaussian.Params())
    edge = 2 * 600**-0.5 / 0.87962566103423978
    assert edge * 0.98 < float(tensor.abs().max()) <= edge * (1 + 1e-6)


def test_uniform_values_fill_xaviers_interval() -> None:
    edge = math.sqrt(6 / 1000)
    assert edge * 0.999 < float(fill(ScaledUniform.Params()).abs().max()) <= edge


def test_constant() -> None:
    assert torch.equal(fill(Constant.Params(value=0.5), shape=(3,)), torch.full((3,), 0.5))


@pytest.mark.parametrize("params", [Gaussian.Params(std=-1.0), ScaledUniform.Params(gain=-1.0)])
def test_negative_sizes_are_refused(params: Initializer.Params) -> None:
    with pytest.raises(ParamsError, match=r"must be at least 0, but is -1\.0"):
        params.instantiate()
