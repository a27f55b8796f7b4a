"""Models whose attention runs in one kernel: with a position bias, packed rows and dropout they train as on the
reference."""

from __future__ import annotations

import logging

import pytest
import torch

from megaseq.base import NestedMap, native
from megaseq.kernels import dispatch, triton_runtime
from megaseq.kernels.attention import RelativeBias, fused
from megaseq.layers import Alibi, EncoderDecoder, families, initialize
from megaseq.layers.base import bind
from tests.kernels.interpreter import needs_kernels

IDS = torch.arange(24).view(2, 12) % 19 + 2
SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 4 + [2] * 3 + [3] * 3 + [0] * 2])


def made(kind: str) -> EncoderDecoder:
    """A tiny model that trains, with dropout on its attention weights."""
    sizes = {"model_dim": 16, "hidden_dim": 20, "num_heads": 2, "num_layers": 2}
    if kind == "alibi":
        p = families.transformer(**{**sizes, "model_dim": 32}, dropout=0.2)
        for stack in (p.encoder, p.decoder):
            stack.positions, stack.position_bias = None, Alibi.Params()
    else:
        p = families.t5(version=kind, head_dim=16, dropout=0.2, **sizes)
    p.source_vocab_size = p.target_vocab_size = 23
    model: EncoderDecoder = p.instantiate()
    initialize(model, seed=1)
    bind(model, seed=1)
    return model.train()


def loss_of(model: EncoderDecoder, *, device: torch.device) -> torch.Tensor:
    """The loss of a batch of packed rows."""
    ids, segment_ids = (torch.tensor(tensor.tolist(), device=device) for tensor in (IDS, SEGMENTS))
    source, target = NestedMap(ids=ids, segment_ids=segment_ids), NestedMap(ids=ids, segment_ids=segment_ids)
    logits = model.logits(model.decode_hidden(target, memory=model.encode(source)))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("fused_by", ["triton", "native"])
@pytest.mark.parametrize("kind", ["1.1", "umt5", "alibi"])
def test_gradients_equal_those_of_the_reference(kind: str, fused_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused_by == "triton":
        needs_kernels()
    if fused_by == "native" and not native.available():
        pytest.skip("there is no compiled extension")
    device = torch.device("cpu" if fused_by == "native" or triton_runtime.interpreted() else "cuda")
    found: list[dict[str, torch.Tensor]] = []
    for implementation in (fused_by, "reference"):
        monkeypatch.setenv("MEGASEQ_KERNELS", f"attention={implementation}")
        model = made(kind).to(device)
        loss = loss_of(model, device=device)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    assert any("position_bias" in name for name in found[0]) is (kind != "alibi")
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=name)


@pytest.mark.skipif(not native.available(), reason="there is no compiled extension")
def test_auto_takes_the_extension_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with dropout and T5's bias, of which no full rows of weights are made."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "_logged", set())
    made_dense: list[object] = []
    monkeypatch.setattr(RelativeBias, "dense", lambda *arguments, **sizes: made_dense.append(sizes))
    with caplog.at_level(logging.INFO, logger="megaseq"):
        loss_of(made("1.1"), device=torch.device("cpu"))
    chosen = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert chosen == ["attention: auto runs the native implementation"] and not made_dense


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is none, the interpreter stands for it."""
    needs_kernels()
    device = torch.device("cpu" if triton_runtime.interpreted() else "cuda")
    monkeypatch.setenv("MEGASEQ_KERNELS", "auto")
    monkeypatch.setattr(fused, "preferred", lambda device: True)
    monkeypatch.setattr(dispatch, "_logged", set())
    model = made("1.1").to(device)
    bias = model.encoder.position_bias
    assert bias is not None and not isinstance(bias(12, device=device), torch.Tensor)
    with caplog.at_level(logging.INFO, logger="megaseq"), torch.no_grad():
        loss_of(model, device=device)
    chosen = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert chosen == ["attention: auto runs the triton implementation"]
