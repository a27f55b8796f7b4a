"""Layers whose parts run as kernels compute what they compute without, forward and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megaseq.layers import LayerNorm, Norm, RMSNorm
from megaseq.layers.base import bind, initialize
from megaseq.layers.branch import ResidualStyle
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.rotary import Rotary
from tests.kernels.graphs import check_graphs, relative_error

KERNELS = "norm=triton,activation=triton,rotary=triton,dropout=triton"


def both(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Output and gradients, with kernels and as on any CPU."""
    results = []
    for kernels in (KERNELS, "reference"):
        monkeypatch.setenv("MEGASEQ_KERNELS", kernels)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        # Not the sum of squares, which a norm at the end makes the same for any input.
        gradients = torch.autograd.grad(
            y, [leaf, *module.parameters()], torch.linspace(-1, 2, y.numel()).to(y).view_as(y)
        )
        results.append([y, *gradients])
    return results


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [RMSNorm.Params(), LayerNorm.Params()], ids=["rms", "layer"])
def test_feed_forward(
    norm: Norm.Params, residual: ResidualStyle, training: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = FeedForward.Params(
        model_dim=20,
        hidden_dim=48,
        norm=norm,
        residual=residual,
        dropout=0.2,
        activation_dropout=0.1,
        bias=True,
        activation="gelu_new",
        gated=True,
    )
    layer = params.instantiate()
    initialize(layer, seed=1)
    bind(layer, seed=1)
    layer.train(training).to(device)
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)).to(device)
    found, expected = both(layer, x, monkeypatch)
    for have, want in zip(found, expected, strict=True):
        assert relative_error(have, want) < 1e-5


def test_under_autocast(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch is bf16, the stream and the weights are float32."""
    params = FeedForward.Params(
        model_dim=20,
        hidden_dim=48,
        norm=RMSNorm.Params(),
        residual="pre",
        dropout=0.2,
        activation_dropout=0.0,
        bias=False,
    )
    layer = params.instantiate()
    initialize(layer, seed=1)
    bind(layer, seed=1)
    layer.train().to(device)
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found, expected = both(layer, x, monkeypatch)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype is torch.float32 and relative_error(have, want) < 2e-2


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotary(layout: str, fraction: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = Rotary.Params(head_dim=16, layout=layout, fraction=fraction).instantiate()  # type: ignore[arg-type]
    rotation = rotary.rotation(torch.arange(5, device=device)[None])
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).to(device)
    turned = copy.copy(rotary)
    monkeypatch.setattr(turned, "forward", lambda leaf: Rotary.forward(rotary, leaf, rotation=rotation))
    found, expected = both(turned, x, monkeypatch)
    for have, want in zip(found, expected, strict=True):
        assert relative_error(have, want) < 1e-5


def test_on_the_host_layers_are_part_of_a_graph() -> None:
    """With nothing asked for: what is traced is what runs."""
    params = FeedForward.Params(
        model_dim=20,
        hidden_dim=48,
        norm=RMSNorm.Params(),
        residual="post",
        dropout=0.0,
        activation_dropout=0.0,
        bias=False,
        activation="silu",
        gated=True,
    )
    layer = params.instantiate()
    initialize(layer, seed=1)
    bind(layer, seed=1)
    rotary = Rotary.Params(head_dim=20).instantiate()
    rotation = rotary.rotation(torch.arange(5)[None])
    x = torch.randn(2, 5, 20).requires_grad_()
    check_graphs(lambda leaf: rotary(layer(leaf)[:, :, None], rotation=rotation), x)
