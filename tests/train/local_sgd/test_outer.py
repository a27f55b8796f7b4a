"""The outer optimizer and how changes are written."""

from __future__ import annotations

import pytest
import torch

from megaseq.train.local_sgd.compression import BLOCK, decode, encode, encoded_size
from megaseq.train.local_sgd.outer import OuterState
from megaseq.train.local_sgd.params import Compression, LocalSGD


def vectors(count: int, *, size: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def cut(state: OuterState, vector: torch.Tensor) -> dict[int, torch.Tensor]:
    return {index: vector[first:last] for index, (first, last) in enumerate(state.bounds)}


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_that_of_torch(fragments: int, momentum: float) -> None:
    start, *gradients = vectors(6)
    parameter = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    state = OuterState(start, params=LocalSGD.Params(outer_momentum=momentum, fragments=fragments, inner_steps=6))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        reference.step()
        touched, data = state.step(cut(state, gradient))
        assert touched == list(range(fragments)) and len(data) == 160
        torch.testing.assert_close(state.values, parameter.detach())
        torch.testing.assert_close(state.published, state.values)
    assert state.version == 5


def test_changes_one_by_one_make_the_step_of_their_mean() -> None:
    start, *gradients = vectors(9)
    together = OuterState(start, params=LocalSGD.Params())
    alone = OuterState(start, params=LocalSGD.Params(mode="asynchronous"))
    for first in range(0, 8, 4):
        together.step({0: torch.stack(gradients[first : first + 4]).mean(dim=0)})
        for gradient in gradients[first : first + 4]:
            alone.add({0: gradient}, workers=4)
        torch.testing.assert_close(alone.values, together.values)
        assert torch.equal(alone.published, alone.values)
    assert alone.version == 8


def test_local_sgd_is_the_mean_of_the_parameters() -> None:
    start, one, two = vectors(3)
    state = OuterState(start, params=LocalSGD.Params(outer_learning_rate=1.0, outer_momentum=0.0))
    state.step({0: ((start - one) + (start - two)) / 2})
    torch.testing.assert_close(state.published, (one + two) / 2)


@pytest.mark.parametrize(("compression", "error"), [("none", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 127)])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_what_is_written_is_read(compression: Compression, error: float, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 1e-3
    data = encode(values, compression=compression)
    assert len(data) == encoded_size(count, compression=compression)
    read = decode(data, count=count, compression=compression)
    if count:
        assert float((read - values).abs().max()) <= error * float(values.abs().max())
    with pytest.raises(ValueError):
        decode(data + b"x", count=count, compression=compression)


def test_zeros_survive_int8() -> None:
    assert torch.equal(decode(encode(torch.zeros(9), compression="int8"), count=9, compression="int8"), torch.zeros(9))


@pytest.mark.parametrize("compression", ["bfloat16", "int8"])
def test_what_rounding_takes_comes_with_the_next_change(compression: Compression) -> None:
    """The published values stay within one rounding of the exact ones, however many steps are made."""
    state = OuterState(torch.zeros(40), params=LocalSGD.Params(compression=compression))
    for gradient in vectors(30):
        state.step({0: gradient * 1e-2})
        assert float((state.published - state.values).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 2, "worker": 2, "address": "a:1"}, "worker: must be -1 or below workers"),
        ({"workers": 2, "worker": 0}, "address: must be HOST:PORT"),
        ({"address": "nowhere"}, "address: must be HOST:PORT"),
        ({"fragments": 3}, "fragments: must divide inner_steps"),
        ({"inner_steps": 0}, "inner_steps: must be at least 1"),
        ({"outer_momentum": 1.0}, "outer_momentum in [0, 1)"),
        ({"timeout_seconds": 0.0}, "timeout_seconds: must be above 0"),
    ],
)
def test_params_that_make_no_training_are_refused(changes: dict[str, object], said: str) -> None:
    problems = "\n".join(map(str, LocalSGD.Params(**changes).check()))  # type: ignore[arg-type]
    assert said in problems
