"""Corpus scores."""

from __future__ import annotations

import pytest
import sacrebleu

from megaseq.base.errors import TrainingError
from megaseq.tasks.scoring import corpus_scores, exact_match

HYPOTHESES = ["a man rides a bike .", "two dogs play in the snow .", "nothing"]
REFERENCES = ["a man is riding a bike .", "two dogs play in the snow .", "something else entirely"]


def test_scores_are_sacrebleus_with_its_signature() -> None:
    scores = corpus_scores(hypotheses=HYPOTHESES, references=REFERENCES)
    bleu = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES])
    assert scores["bleu"].value == bleu.score
    assert scores["chrf"].value == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert scores["bleu"].signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nc:6" in scores["chrf"].signature
    assert scores["exact_match"].value == pytest.approx(100 / 3)
    assert scores["exact_match"].as_dict() == {"value": pytest.approx(100 / 3)}
    assert set(scores["bleu"].as_dict()) == {"value", "signature"}


def test_frozen_value() -> None:
    # Computed once with sacrebleu 2.6.0; a change means that scores no longer compare with older ones.
    assert corpus_scores(hypotheses=HYPOTHESES, references=REFERENCES)["bleu"].value == pytest.approx(58.027, abs=0.001)


def test_exact_match_ignores_outer_white_space_only() -> None:
    assert exact_match(hypotheses=["a b ", "a  b", "A b"], references=["a b", "a b", "a b"]) == pytest.approx(100 / 3)
    assert exact_match(hypotheses=[], references=[]) == 0.0


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], []), ([], [])])
def test_lists_that_do_not_fit_are_refused(hypotheses: list[str], references: list[str]) -> None:
    with pytest.raises(TrainingError, match="one reference for each hypothesis"):
        corpus_scores(hypotheses=hypotheses, references=references)
