"""Constraints one by one, against the plain definition; equality with transformers is tested next door."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megaseq.base import ParamsError
from megaseq.decode import (
    BadWords,
    ForcedBos,
    ForcedEos,
    ForcedTokens,
    LogitsProcessor,
    NoRepeatNgrams,
    RepetitionPenalty,
    SuppressedTokens,
)
from megaseq.decode.constraints import View

VOCAB = 6
NEG_INF = float("-inf")


def histories(*, longest: int) -> st.SearchStrategy[list[list[int]]]:
    """One to three hypotheses of the same length."""

    def of_length(length: int) -> st.SearchStrategy[list[list[int]]]:
        return st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=3)

    return st.integers(0, longest).flatmap(of_length)


def apply(params: LogitsProcessor.Params, ids: list[list[int]], *, last: bool = False) -> list[list[float]]:
    """Scores 0.0, 0.1, ... of one source whose hypotheses have these `ids`, after the processor."""
    scores = (torch.arange(VOCAB) / 10).expand(1, len(ids), VOCAB).contiguous()
    before = scores.clone()
    history = torch.tensor([ids], dtype=torch.long).view(1, len(ids), -1)
    view = View(ids=history, rows=torch.zeros(1, dtype=torch.long), last=torch.tensor([last]), eos_id=1)
    result: Any = params.instantiate()(scores, view=view)
    assert torch.equal(scores, before)
    return result[0].tolist()


def forbidden(row: list[float]) -> set[int]:
    """Tokens at -inf."""
    return {token for token, score in enumerate(row) if score == NEG_INF}


def test_forced_tokens() -> None:
    """First, last, and the first few."""
    assert apply(ForcedBos.Params(token_id=4), [[]])[0] == [NEG_INF] * 4 + [0.0, NEG_INF]
    assert forbidden(apply(ForcedBos.Params(token_id=4), [[2]])[0]) == set()
    assert forbidden(apply(ForcedEos.Params(), [[2]])[0]) == set()
    assert apply(ForcedEos.Params(), [[2]], last=True)[0][1] == 0.0
    assert forbidden(apply(ForcedEos.Params(), [[2]], last=True)[0]) == {0, 2, 3, 4, 5}
    prefix = ForcedTokens.Params(token_ids=(3, 2))
    assert forbidden(apply(prefix, [[]])[0]) == {0, 1, 2, 4, 5}
    assert forbidden(apply(prefix, [[3]])[0]) == {0, 1, 3, 4, 5}
    assert apply(prefix, [[]])[0][3] == pytest.approx(0.3) and forbidden(apply(prefix, [[3, 2]])[0]) == set()


def test_suppressed_tokens() -> None:
    """Always, and at the beginning."""
    params = SuppressedTokens.Params(token_ids=(2,), begin_token_ids=(0, 5))
    assert forbidden(apply(params, [[]])[0]) == {0, 2, 5} and forbidden(apply(params, [[0]])[0]) == {2}
    assert forbidden(apply(SuppressedTokens.Params(), [[]])[0]) == set()


def test_repetition_penalty() -> None:
    """Positive scores are divided; a token that came twice is punished once."""
    row = apply(RepetitionPenalty.Params(penalty=2.0), [[4, 4, 3]])[0]
    assert row == pytest.approx([0.0, 0.1, 0.2, 0.15, 0.2, 0.5])


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 4),
    ids=histories(longest=8),
)
def test_no_repeat_ngrams(size: int, ids: list[list[int]]) -> None:
    """A token is forbidden exactly when it would complete a sequence that is there already."""
    for history, row in zip(ids, apply(NoRepeatNgrams.Params(size=size), ids), strict=True):
        seen = {tuple(history[n : n + size]) for n in range(len(history) - size + 1)}
        latest = tuple(history[len(history) - size + 1 :]) if size > 1 else ()
        assert forbidden(row) == {token for token in range(VOCAB) if (*latest, token) in seen}


@settings(max_examples=100, deadline=None)
@given(
    ids=histories(longest=5),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4),
)
def test_bad_words(ids: list[list[int]], words: list[list[int]]) -> None:
    """A token is forbidden exactly when it would complete a bad sequence."""
    params = BadWords.Params(sequences=tuple(tuple(word) for word in words))
    for history, row in zip(ids, apply(params, ids), strict=True):
        ends = [w[-1] for w in words if len(w) - 1 <= len(history) and history[len(history) - len(w) + 1 :] == w[:-1]]
        assert forbidden(row) == set(ends)


@pytest.mark.parametrize(
    "params",
    [
        NoRepeatNgrams.Params(size=0),
        RepetitionPenalty.Params(penalty=0.0),
        BadWords.Params(sequences=((),)),
        ForcedBos.Params(),
    ],
)
def test_bad_options_are_refused(params: LogitsProcessor.Params) -> None:
    """Before any work."""
    with pytest.raises(ParamsError):
        params.instantiate()
