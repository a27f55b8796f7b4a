"""The benchmark of attention: its peers compute what it does, and its proofs find a wrong kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megaseq.kernels.attention import bench
from megaseq.kernels.attention.bench import SHAPES, Shape
from megaseq.kernels.bench.proof import prove

HOST = torch.device("cpu")
SMALL = (
    Shape("biased", 2, 24, 24, heads=2, head_dim=16, biased=True),
    Shape("biased_causal", 2, 24, 24, heads=2, head_dim=16, biased=True, causal=True),
    Shape("biased_packed", 2, 24, 24, heads=2, head_dim=16, biased=True, segments=3),
    Shape("cross", 2, 16, 24, heads=2, head_dim=16),
    Shape("cross_packed", 2, 16, 24, heads=2, head_dim=16, segments=4),
    Shape("packed_causal", 2, 24, 24, heads=2, head_dim=16, segments=3, causal=True),
)


def outputs(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    """What the op gives, as [B, N, T, H], and its peers; forward passes alone."""

    def forward_alone(forward: Callable[[], Tensor], *, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
        assert all(tensor.requires_grad for tensor in inputs)
        for tensor in inputs:
            tensor.requires_grad_(False)  # On the host FlexAttention refuses them.
        return forward

    monkeypatch.setattr(bench, "_trained", forward_alone)
    # What the peers are compared with is any implementation that can run here.
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    timed = bench.prepare(shape, HOST)
    assert timed.flops > 0 and timed.goals.keys() == timed.peers.keys()
    made = {name: make() for name, make in timed.peers.items() if name != "segments_apart"}
    return timed.run().transpose(1, 2), made  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_peers_compute_the_same(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, peers = outputs(shape, monkeypatch)
    compared = {"sdpa_with_bias"} | (set() if shape.biased else {"flash_without_bias"})
    for name in compared & peers.keys():
        torch.testing.assert_close(peers[name](), expected, rtol=0, atol=1e-5)
    assert compared & peers.keys() or shape.segments > 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", SMALL[1:3], ids=lambda shape: shape.name)
def test_flex_attention_computes_the_same(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, peers = outputs(shape, monkeypatch)
    torch.testing.assert_close(peers["flex_attention"](), expected, rtol=0, atol=1e-5)


def test_every_shape_trains_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    timed = bench.prepare(SMALL[0], HOST)
    gradients = timed.run()
    assert len(gradients) == 4  # type: ignore[arg-type]
    assert len(timed.peers["sdpa_with_bias"]()()) == 4  # type: ignore[arg-type]


def test_names_are_unique() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert len({case.name for case in bench.bench_cases()}) == len(SHAPES)


def test_proofs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are right for one shape, and a wrong result would be found."""
    case = next(case for case in bench.bench_cases() if case.name == "t5_large_decoder_128")
    assert prove(case, device=device) == []
    real = bench.reference_attention
    monkeypatch.setattr(bench, "reference_attention", lambda *args, **kwargs: 1.1 * real(*args, **kwargs))
    found = prove(dataclasses.replace(case), device=device)
    assert len(found) == 5 and "gradient of table" in found[-1]
