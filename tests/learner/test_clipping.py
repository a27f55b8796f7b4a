"""The global norm and the clip coefficient."""

from __future__ import annotations

import math

import torch

from megaseq.learner import clip_coefficient, global_norm


def test_global_norm_is_that_of_the_concatenation() -> None:
    tensors = [torch.randn(3, 5), torch.randn(()), torch.randn(7)]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double()
    assert math.isclose(global_norm(tensors), float(flat.norm()), rel_tol=1e-6)
    assert global_norm([]) == 0.0


def test_global_norm_shows_values_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert not math.isfinite(global_norm([torch.ones(4), torch.tensor([1.0, bad])]))


def test_global_norm_asks_other_ranks_for_their_squares() -> None:
    norm = global_norm([torch.tensor([3.0])], reduce=lambda squared: squared + 16.0)
    assert norm == 5.0


def test_clip_coefficient() -> None:
    assert clip_coefficient(4.0, limit=None) == 1.0
    assert clip_coefficient(0.0, limit=1.0) == 1.0
    assert clip_coefficient(1.0, limit=1.0) == 1.0
    assert clip_coefficient(4.0, limit=1.0) == 0.25
