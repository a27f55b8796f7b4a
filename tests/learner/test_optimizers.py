"""The optimizers against independent implementations, and what they promise about their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.base import ParamsError
from megaseq.kernels.adamw import adamw_
from megaseq.learner import SGD, Adafactor, AdamW, Constant, Learner, Optimizer
from megaseq.learner import adamw as module

from .conftest import make_gradients, make_parameters

STEPS = 12


def train(
    p: Optimizer.Params, *, learning_rate: float, weight_decay: float = 0.0, scale: float = 1.0
) -> dict[str, Tensor]:
    parameters = make_parameters()
    learner = Learner.Params(
        learning_rate=learning_rate,
        schedule=Constant.Params(),
        optimizer=p,
        clip_norm=None,
        weight_decay=weight_decay,
        weight_decay_min_dims=0,
    ).instantiate(named_parameters=parameters)
    for step in range(STEPS):
        gradients = {name: gradient / scale for name, gradient in make_gradients(step).items()}
        learner.update(step=step, grads=gradients, gradient_scale=scale)
    return parameters


def train_with(make: Any) -> dict[str, Tensor]:
    """Runs an optimizer of torch's interface over the same gradients."""
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in make_parameters().items()}
    optimizer = make(list(parameters.values()))
    for step in range(STEPS):
        for name, gradient in make_gradients(step).items():
            parameters[name].grad = gradient
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    initial = make_parameters()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)
        assert not torch.equal(got[name], initial[name])


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float, scale: float) -> None:
    expected = train_with(
        lambda ps: torch.optim.AdamW(ps, lr=0.02, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay, foreach=False)
    )
    got = train(AdamW.Params(epsilon=1e-8), learning_rate=0.02, weight_decay=weight_decay, scale=scale)
    assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_adamw_by_other_kernels(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU flat shares are updated by Triton; here both run when asked for."""
    pytest.importorskip("triton")
    settings = {"learning_rate": 0.02, "weight_decay": 0.1, "scale": 1 / 3}
    expected = train(AdamW.Params(), **settings)
    monkeypatch.setenv("MEGASEQ_KERNELS", f"adamw={implementation}")
    assert_close(train(AdamW.Params(), **settings), expected)


def test_adamw_by_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lists, scale and count arrive; the arithmetic stands in for apex's."""
    settings = {"learning_rate": 0.02, "weight_decay": 0.1, "scale": 1 / 3}
    expected = train(AdamW.Params(), **settings)
    calls = []

    def update(parameters, *, gradients, moments, settings, step, divisor, skip) -> None:  # type: ignore[no-untyped-def]
        calls.append(float(step))
        for p, g, m, v in zip(parameters, gradients, *moments, strict=True):
            flat = [x.view(-1) for x in (p, g, m, v)]
            adamw_(
                flat[0], gradients=flat[1], moments=(flat[2], flat[3]), settings=settings, step=step, divisor=divisor
            )

    monkeypatch.setattr(module, "choose_adamw", lambda tensor, flat: "apex")
    monkeypatch.setattr(module, "apex_adamw_", update)
    assert_close(train(AdamW.Params(), **settings), expected)
    assert sorted(set(calls)) == [float(step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_sgd_is_torchs(momentum: float, nesterov: bool, weight_decay: float, scale: float) -> None:
    expected = train_with(
        lambda ps: torch.optim.SGD(
            ps, lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, foreach=False
        )
    )
    p = SGD.Params(momentum=momentum, nesterov=nesterov)
    assert_close(train(p, learning_rate=0.02, weight_decay=weight_decay, scale=scale), expected)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale_by_parameter", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_adafactor_is_the_one_of_transformers(
    beta1: float | None, weight_decay: float, scale_by_parameter: bool, scale: float
) -> None:
    transformers = pytest.importorskip("transformers")
    expected = train_with(
        lambda ps: transformers.Adafactor(
            ps,
            lr=0.02,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_by_parameter,
            relative_step=False,
            warmup_init=False,
        )
    )
    p = Adafactor.Params(beta1=beta1, scale_by_parameter=scale_by_parameter, min_dim_to_factor=1)
    assert_close(train(p, learning_rate=0.02, weight_decay=weight_decay, scale=scale), expected)


@pytest.mark.parametrize("warmup", [False, True])
def test_adafactors_relative_step_is_the_one_of_transformers(warmup: bool) -> None:
    transformers = pytest.importorskip("transformers")
    expected = train_with(
        lambda ps: transformers.Adafactor(ps, lr=None, scale_parameter=True, relative_step=True, warmup_init=warmup)
    )
    p = Adafactor.Params(relative_step=True, relative_step_warmup=warmup, min_dim_to_factor=1)
    assert_close(train(p, learning_rate=1.0), expected)


def test_adafactor_factors_only_large_matrices() -> None:
    parameters = {"large": torch.randn(4, 130, 128), "narrow": torch.randn(300, 127), "vector": torch.randn(500)}
    learner = Learner.Params(learning_rate=0.1, optimizer=Adafactor.Params()).instantiate(named_parameters=parameters)
    shapes = {name: tuple(tensor.shape) for name, tensor in learner.state_tensors().items()}
    assert shapes == {
        "learner.second_moment_row.large": (4, 130),
        "learner.second_moment_column.large": (4, 128),
        "learner.second_moment.narrow": (300, 127),
        "learner.second_moment.vector": (500,),
    }


@pytest.mark.parametrize("p", [AdamW.Params(), SGD.Params(momentum=0.9), Adafactor.Params(scale_by_parameter=False)])
def test_every_optimizer_descends_a_quadratic(p: Optimizer.Params) -> None:
    weight = torch.linspace(-2.0, 2.0, 16)
    learner = Learner.Params(learning_rate=0.05, optimizer=p, clip_norm=None).instantiate(
        named_parameters={"w": weight}
    )
    for step in range(300):
        learner.update(step=step, grads={"w": weight - 0.5})
    assert float((weight - 0.5).abs().max()) < 0.05


def test_sgd_without_momentum_has_no_state() -> None:
    learner = Learner.Params(learning_rate=0.1, optimizer=SGD.Params()).instantiate(named_parameters=make_parameters())
    assert learner.state_tensors() == {}


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (AdamW.Params(beta2=1.0), r"beta2: must be in \[0, 1\), but is 1.0"),
        (AdamW.Params(epsilon=-1.0), "epsilon: must be at least 0"),
        (SGD.Params(nesterov=True), "nesterov: must be off without momentum"),
        (Adafactor.Params(decay_exponent=0.5), "decay_exponent: must be at most 0"),
        (Adafactor.Params(update_clip=0.0), "update_clip: must be positive"),
    ],
)
def test_bad_params_are_reported(p: Optimizer.Params, text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        p.instantiate(groups=())
