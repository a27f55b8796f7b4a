"""Norms against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from megaseq.base import ParamsError
from megaseq.layers import LayerNorm, Norm, RMSNorm


def filled(norm: Norm) -> Norm:
    """Gives the parameters random values; returns `norm`."""
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return norm


X = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2)) * 3 + 1


def test_layer_norm_is_its_formula() -> None:
    norm = filled(LayerNorm.Params(dim=10).instantiate())
    x = X.double()
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(X), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("add_one", [False, True])
def test_rms_norm_is_its_formula(add_one: bool) -> None:
    norm = filled(RMSNorm.Params(dim=10, add_one=add_one).instantiate())
    x = X.double()
    weight = norm.weight + 1 if add_one else norm.weight
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(norm(X), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "params", [LayerNorm.Params(dim=512), RMSNorm.Params(dim=512), RMSNorm.Params(dim=512, add_one=True)]
)
def test_statistics_are_float32_in_bfloat16(params: Norm.Params) -> None:
    """Only the rounding of the result is lost, also with weights that stay in float32."""
    norm = params.instantiate()
    for parameter in norm.parameters():
        parameter.data.fill_(0.5)
    x = (torch.randn(5, 512, generator=torch.Generator().manual_seed(3)) * 100 + 300).bfloat16()
    half, full = norm(x), norm(x.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2**-7, atol=1e-6)


def test_layer_norm_without_bias_has_none() -> None:
    norm = LayerNorm.Params(dim=4, bias=False).instantiate()
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_a_wrong_epsilon_is_refused() -> None:
    with pytest.raises(ParamsError, match="eps: must be positive, but is 0"):
        LayerNorm.Params(dim=4, eps=0.0).instantiate()
