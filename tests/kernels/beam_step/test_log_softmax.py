"""Log-probabilities and the best of them: the extension against torch."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megaseq.base import native
from megaseq.kernels.beam_step.log_softmax import log_probabilities, log_softmax_topk

NEG_INF = float("-inf")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(1, 900), k=st.integers(1, 9), values=st.sampled_from([2, 50, 10**6])
)
def test_the_best_are_those_of_all(seed: int, vocab: int, k: int, values: int) -> None:
    """Bit for bit those of `log_probabilities`, the lower id first among equals; close to torch's log_softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (3, vocab), generator=generator).float() / max(1, values // 20) - 7
    logits[0, torch.randint(vocab, (vocab // 3,), generator=generator)] = NEG_INF
    scores = log_probabilities(logits)
    if bool((logits > NEG_INF).any(-1).all()):
        torch.testing.assert_close(scores, logits.double().log_softmax(-1).float(), rtol=1e-6, atol=1e-6)
    got, ids, last = log_softmax_topk(logits, k=k, column=vocab - 1)
    wanted, order = scores.sort(dim=-1, descending=True, stable=True)
    k = min(k, vocab)
    assert torch.equal(got, wanted[:, :k]) and torch.equal(last, scores[:, -1])
    finite = got > NEG_INF
    assert torch.equal(ids[finite], order[:, :k][finite])


def test_the_extension_and_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the C++ extension is not built")
    logits = torch.randn(40, 8001, generator=torch.Generator().manual_seed(1)) * 5
    mine = log_softmax_topk(logits, k=9, column=3)
    monkeypatch.setenv("MEGASEQ_NATIVE", "0")
    theirs = log_softmax_topk(logits, k=9, column=3)
    assert torch.equal(mine[1], theirs[1])
    exact = logits.double().log_softmax(-1).float()
    torch.testing.assert_close(mine[0], exact.gather(1, mine[1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine[2], exact[:, 3], rtol=1e-6, atol=1e-6)
    # torch's own sum is the less exact one.
    torch.testing.assert_close(theirs[0], mine[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("native_on", ["1", "0"])
def test_dead_rows_stay_dead_and_nan_shows(native_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_NATIVE", native_on)
    logits = torch.zeros(4, 200)
    logits[0] = NEG_INF
    logits[1, 150] = float("nan")
    logits[2, 150] = float("inf")
    logits[3, 7] = -1e30
    values, ids, column = log_softmax_topk(logits, k=3, column=0)
    assert values[0].tolist() == [NEG_INF] * 3 and column[0] == NEG_INF
    assert bool(((ids >= 0) & (ids < 200)).all())
    assert values[1, 0].isnan() and values[2, 0].isnan()
    assert log_probabilities(logits)[0].eq(NEG_INF).all()
    assert log_probabilities(logits)[1].isnan().all()
    torch.testing.assert_close(values[3], torch.full((3,), -torch.tensor(199.0).log().item()))
    assert ids[3].tolist() == [0, 1, 2]
