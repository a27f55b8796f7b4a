"""Outputs and scores equal those of transformers' `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.decode import (
    BadWords,
    BeamSearch,
    ForcedBos,
    ForcedEos,
    GreedySearch,
    NoRepeatNgrams,
    RepetitionPenalty,
    SuppressedTokens,
    beam_search,
    greedy_search,
)

from .hugging_face import EOS, PAD, HuggingFaceDecoder, random_sources, tiny_marian, tiny_t5

MODELS = {"t5": tiny_t5, "marian": tiny_marian}
STEPS = 12


def params(num_beams: int, **changes: Any) -> BeamSearch.Params:
    """The convention of transformers."""
    termination = {True: "full_beam", False: "heuristic", "never": "never"}[changes.pop("early_stopping", False)]
    settings: dict[str, Any] = dict(
        num_hyps_per_beam=num_beams,
        num_best=num_beams,
        target_sos_id=PAD,
        target_eos_id=EOS,
        target_seq_len=STEPS,
        length_penalty=1.0,
        candidates="merged",
        termination=termination,
        valid_eos_max_logit_delta=float("inf"),
        local_eos_threshold=float("-inf"),
        force_eos_in_last_step=False,
        keep_unfinished=True,
    )
    return BeamSearch.Params(**(settings | changes))


def generated(model: Any, source: Any, **settings: Any) -> tuple[list[tuple[int, ...]], list[float]]:
    """What transformers gives: tokens without the end, and scores."""
    settings = dict(max_new_tokens=STEPS, min_new_tokens=None, do_sample=False) | settings
    output = model.generate(
        source.ids, attention_mask=source.segment_ids, return_dict_in_generate=True, output_scores=True, **settings
    )
    rows = []
    for row in output.sequences[:, 1:].tolist():
        rows.append(tuple(row[: row.index(EOS)] if EOS in row else row))
    scores = getattr(output, "sequences_scores", None)
    return rows, [] if scores is None else scores.tolist()


def trimmed(ids: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """transformers pads with 0, which is a token of the vocabulary too; compare up to trailing zeros."""
    while len(ids) > len(like) and ids[-1] == PAD:
        ids = ids[:-1]
    return ids


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy(family: str, seed: int) -> None:
    """Greedy search equals generate, source by source, finished or not."""
    model, source = MODELS[family](seed), random_sources(seed)
    wanted, _ = generated(model, source, num_beams=1)
    params = GreedySearch.Params(target_sos_id=PAD, target_eos_id=EOS, target_seq_len=STEPS)
    got = [hyps[0].ids for hyps in greedy_search(HuggingFaceDecoder(model), source=source, params=params)]
    assert [trimmed(ids, like) for ids, like in zip(wanted, got, strict=True)] == got


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
def test_beam(family: str, num_beams: int, early_stopping: bool | str, length_penalty: float) -> None:
    """All returned hypotheses and their scores are equal, in order."""
    for seed in (1, 2, 3):
        model, source = MODELS[family](seed), random_sources(seed)
        settings = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        wanted, scores = generated(model, source, num_beams=num_beams, num_return_sequences=num_beams, **settings)
        result = beam_search(HuggingFaceDecoder(model), source=source, params=params(num_beams, **settings))
        got = [hyp for hyps in result for hyp in hyps]
        assert all(len(hyps) == num_beams for hyps in result)
        assert [hyp.ids for hyp in got] == [trimmed(w, g.ids) for w, g in zip(wanted, got, strict=True)]
        torch.testing.assert_close(torch.tensor([hyp.score for hyp in got]), torch.tensor(scores), rtol=1e-5, atol=1e-5)


PROCESSORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "forced_bos": ((ForcedBos.Params(token_id=5),), {"forced_bos_token_id": 5}),
    "forced_eos": ((ForcedEos.Params(),), {"forced_eos_token_id": EOS}),
    "suppress": ((SuppressedTokens.Params(token_ids=(3, 7, 9)),), {"suppress_tokens": [3, 7, 9]}),
    "begin": ((SuppressedTokens.Params(begin_token_ids=(4, 6, 8)),), {"begin_suppress_tokens": [4, 6, 8]}),
    "ngrams": ((NoRepeatNgrams.Params(size=2),), {"no_repeat_ngram_size": 2}),
    "penalty": ((RepetitionPenalty.Params(penalty=1.7),), {"repetition_penalty": 1.7}),
    "bad_words": (
        (BadWords.Params(sequences=((3,), (5, 6), (7, 7))),),
        {"bad_words_ids": [[3], [5, 6], [7, 7]]},
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_processors(name: str, num_beams: int) -> None:
    """Each constraint equals that of transformers. PAD, which starts the decoder there and so counts as a token of the
    output, is suppressed on both sides."""
    processors, settings = PROCESSORS[name]
    processors = (*processors, SuppressedTokens.Params(token_ids=(PAD,)))
    settings = settings | {"suppress_tokens": [*settings.get("suppress_tokens", []), PAD]}
    for family in MODELS:
        model, source = MODELS[family](4), random_sources(4)
        wanted, scores = generated(model, source, num_beams=num_beams, **settings)
        decoder = HuggingFaceDecoder(model)
        if num_beams == 1:
            greedy = GreedySearch.Params(
                target_sos_id=PAD, target_eos_id=EOS, target_seq_len=STEPS, processors=processors
            )
            got = greedy_search(decoder, source=source, params=greedy)
        else:
            got = beam_search(decoder, source=source, params=params(num_beams, processors=processors))
            torch.testing.assert_close(torch.tensor([hyps[0].score for hyps in got]), torch.tensor(scores))
        assert [hyps[0].ids for hyps in got] == [trimmed(w, g[0].ids) for w, g in zip(wanted, got, strict=True)]


@pytest.mark.parametrize("family", MODELS)
def test_minimum_length(family: str) -> None:
    """`min_seq_len` equals `min_new_tokens`."""
    model, source = MODELS[family](5), random_sources(5)
    wanted, _ = generated(model, source, num_beams=4, min_new_tokens=6)
    got = beam_search(HuggingFaceDecoder(model), source=source, params=params(4, min_seq_len=6))
    assert [hyps[0].ids for hyps in got] == [trimmed(w, g[0].ids) for w, g in zip(wanted, got, strict=True)]
    assert all(len(hyps[0].ids) >= 6 for hyps in got)
