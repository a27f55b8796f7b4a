"""MEGASEQ_KERNELS: names, refusals, one log line."""

from __future__ import annotations

import logging

import pytest
import torch

from megaseq.kernels import dispatch
from megaseq.kernels.activation import gated_activation
from megaseq.kernels.checks import KernelError
from megaseq.kernels.norm import NormKind, norm
from megaseq.kernels.rotary import rotate


def test_auto_takes_the_automatic_and_logs_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="megaseq"):
        for _ in range(3):
            assert dispatch.choose("attention", automatic="sdpa", impossible={}) == "sdpa"
    assert [record.getMessage() for record in caplog.records] == ["attention: auto runs the sdpa implementation"]


def test_ops_that_are_quick_in_host_memory_log_it_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    angles = torch.zeros(1, 3, 1, 4)
    with caplog.at_level(logging.INFO, logger="megaseq"):
        for _ in range(2):
            norm(torch.zeros(2, 4), weight=torch.ones(4), kind=NormKind(1e-6))
            gated_activation(torch.zeros(2, 4), name="relu")
            rotate(torch.zeros(2, 3, 1, 4), cosines=angles, sines=angles)
    assert [record.getMessage() for record in caplog.records] == [
        "norm: auto runs the torch implementation",
        "activation: auto runs the reference implementation",
        "rotary: auto runs the reference implementation",
    ]
    assert dispatch.automatic_choices() == {"activation": ["reference"], "norm": ["torch"], "rotary": ["reference"]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", {"attention": "reference", "cross_entropy": "reference", "dropout": "reference"}),
        ("sdpa", {"attention": "sdpa", "cross_entropy": "auto", "dropout": "auto"}),
        ("attention=reference, dropout=native", {"attention": "reference", "dropout": "native"}),
        ("auto", {"attention": "auto", "dropout": "auto"}),
        ("triton,attention=sdpa", {"attention": "sdpa", "cross_entropy": "triton"}),
    ],
)
def test_values(value: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, value)
    assert {op: dispatch.requested(op) for op in expected} == expected


@pytest.mark.parametrize("value", ["tritn", "atention=sdpa", "dropout=sdpa"])
def test_unknown_names_are_errors(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, value)
    with pytest.raises(KernelError, match=rf"MEGASEQ_KERNELS: each item must be .* but is '{value}'"):
        dispatch.requested("attention")


def test_impossible_request_names_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(KernelError, match=r"but is triton, and there is no GPU\. Use auto, or one of: reference"):
        dispatch.choose("attention", automatic="sdpa", impossible={"triton": "there is no GPU"})


def test_the_choice_can_be_traced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.choose("attention", automatic="sdpa", impossible={}) == "sdpa" else x

    with caplog.at_level(logging.INFO, logger="megaseq"):
        assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(2)), torch.ones(2))
    assert [record.getMessage() for record in caplog.records] == ["attention: auto runs the sdpa implementation"]
