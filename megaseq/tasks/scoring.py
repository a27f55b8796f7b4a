"""Corpus scores of decoded text: BLEU and chrF by sacrebleu, with its signature, and exact match."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megaseq.base.errors import AsText, TrainingError, must


@dataclasses.dataclass(frozen=True)
class Score:
    """One corpus-level figure and how it was computed."""

    value: float
    signature: str = ""
    """sacrebleu's version string; two BLEU figures compare only where these are equal."""

    def as_dict(self) -> dict[str, float | str]:
        """JSON-able form; `signature` only where there is one."""
        return {"value": self.value, "signature": self.signature} if self.signature else {"value": self.value}


def exact_match(*, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Percentage of hypotheses that equal their reference up to surrounding white space, 0 to 100."""
    same = sum(
        hypothesis.strip() == reference.strip() for hypothesis, reference in zip(hypotheses, references, strict=True)
    )
    return 100.0 * same / max(1, len(hypotheses))


def corpus_scores(
    *, hypotheses: Sequence[str], references: Sequence[str], bleu_tokenizer: str = "13a"
) -> dict[str, Score]:
    """Scores a whole corpus of detokenised text against one reference each.

    BLEU and chrF are sacrebleu's (Post, 2018, "A Call for Clarity in Reporting BLEU Scores"), 0 to 100.

    Args:
        hypotheses: one line of plain text per example.
        references: as many lines.
        bleu_tokenizer: sacrebleu's name of the tokenizer inside BLEU: 13a, intl, zh, ja-mecab, char, none.

    Returns:
        `bleu`, `chrf` and `exact_match`.

    Raises:
        TrainingError: the two lists differ in length, or there is nothing to score.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise must(
            "scores",
            "have one reference for each hypothesis, at least one",
            AsText(f"{len(hypotheses)} hypotheses and {len(references)} references"),
            "Score the lines of one data set, all of them",
            kind=TrainingError,
        )
    # Imported here: sacrebleu takes a noticeable part of a second, which a training start need not pay.
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(tokenize=bleu_tokenizer), CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)])
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)])
    return {
        "bleu": Score(value=float(bleu_score.score), signature=str(bleu.get_signature())),
        "chrf": Score(value=float(chrf_score.score), signature=str(chrf.get_signature())),
        "exact_match": Score(value=exact_match(hypotheses=hypotheses, references=references)),
    }
