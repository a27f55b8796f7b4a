"""Decodes plain text: batches of similar length through a task's search, and the results back in order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megaseq.base import Configurable, NestedMap
from megaseq.data.tokenizer import Tokenizer
from megaseq.data.vocabulary import Vocabulary
from megaseq.decode.concurrent import default_workers, map_concurrently
from megaseq.decode.hypothesis import Hypothesis
from megaseq.parallel.expert import same_tokens
from megaseq.tasks.base import BaseTask
from megaseq.tasks.scoring import Score, corpus_scores
from megaseq.train.run_dir import write_atomically
from megaseq.train.spread import ALONE, Spread


@dataclasses.dataclass(frozen=True)
class TextHypothesis:
    """One decoded text with what it scored."""

    text: str
    score: float
    logprob: float


@dataclasses.dataclass(frozen=True)
class DecodedSet:
    """A decoded data set: lists of one length, in the order of the input."""

    sources: list[str]
    references: list[str]
    hypotheses: list[list[TextHypothesis]]
    """n best of each source, best first."""
    scores: dict[str, Score]

    @property
    def outputs(self) -> list[str]:
        """The best text of each source."""
        return [best_text(hypotheses) for hypotheses in self.hypotheses]


def best_text(hypotheses: Sequence[TextHypothesis]) -> str:
    """Returns the first text, or an empty one where the search found none."""
    return hypotheses[0].text if hypotheses else ""


def source_batch(rows: Sequence[Sequence[int]], *, tokenizer: Tokenizer) -> NestedMap:
    """Returns ids, segment_ids and positions [B, S] of `rows`, which end with eos already."""
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(int(lengths.max())).expand(len(rows), -1)
    present = positions < lengths[:, None]
    ids = torch.full(present.shape, tokenizer.pad_id)
    ids[present] = torch.tensor([token for row in rows for token in row])
    return NestedMap(ids=ids, segment_ids=present.long(), positions=torch.where(present, positions, 0))


def _batches(lengths: Sequence[int], *, batch_tokens: int) -> list[list[int]]:
    """Groups indices by falling length, each group of at most `batch_tokens` cells; the longest, the dearest, first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def decode_texts(
    task: BaseTask,
    *,
    texts: Sequence[str],
    vocabulary: Vocabulary,
    search: Configurable.Params,
    batch_tokens: int = 2048,
    first_key: int = 0,
    keep_going: Callable[[], bool] = lambda: True,
    spread: Spread = ALONE,
) -> list[list[TextHypothesis]]:
    """Decodes `texts`, tags included, with `task` as it is (its mode and weights are the caller's).

    On the cores of a host several batches are decoded at once.

    Args:
        task: in evaluation mode, on the device it computes on.
        texts: one example each.
        vocabulary: tokenizers of source and target.
        search: params of beam search or sampling.
        batch_tokens: source cells, padding included, of one batch; samples do not depend on it.
        first_key: index of the first text in the corpus; another index draws other samples.
        keep_going: asked before each batch; False ends early, the rest get no hypothesis.
        spread: which batches are this rank's.

    Returns:
        For each text its n best hypotheses, best first, as detokenised text; of several ranks the first one has them.
    """
    device = next(task.parameters()).device
    rows = [[*map(int, ids), vocabulary.source.eos_id] for ids in vocabulary.source.encode_batch(list(texts))]
    decoded: list[list[TextHypothesis]] = [[] for _ in texts]
    lengths = [len(row) for row in rows]
    groups = _batches(lengths, batch_tokens=batch_tokens)
    # Few texts are dealt out in smaller batches, so that every rank has some of them.
    while len(groups) < min(len(rows), spread.decoding_ranks):
        batch_tokens //= 2
        groups = _batches(lengths, batch_tokens=batch_tokens)

    def decode(group: list[int] | None) -> list[list[Hypothesis]]:
        if group is None:
            return []
        batch = source_batch([rows[index] for index in group], tokenizer=vocabulary.source)
        batch = batch.transform(lambda value: value.to(device))
        keys = torch.tensor(group, device=device) + first_key
        return task.decode(batch, search=search, keys=keys)

    own = spread.deal(groups)
    with same_tokens(task):
        results = map_concurrently(decode, items=own, workers=default_workers(device), keep_going=keep_going)
    found: dict[int, list[tuple[str, float, float]]] = {}
    for group, hypotheses in zip(own, results, strict=True):
        for index, best in zip(group or [], hypotheses or [], strict=hypotheses is not None):
            found[index] = [(vocabulary.target.decode(h.ids), float(h.score), float(h.logprob)) for h in best]
    for index, texts_found in spread.collect(found).items():
        decoded[index] = [TextHypothesis(text=text, score=score, logprob=lp) for text, score, lp in texts_found]
    return decoded


def decode_set(
    task: BaseTask,
    *,
    sources: Sequence[str],
    references: Sequence[str],
    vocabulary: Vocabulary,
    search: Configurable.Params,
    keep_going: Callable[[], bool] = lambda: True,
    spread: Spread = ALONE,
) -> DecodedSet:
    """Decodes and scores a data set; the scores are empty where it was ended early.

    Of several ranks all return the scores, and the first one the hypotheses.
    """
    hypotheses = decode_texts(
        task, texts=sources, vocabulary=vocabulary, search=search, keep_going=keep_going, spread=spread
    )
    decoded = DecodedSet(sources=list(sources), references=list(references), hypotheses=hypotheses, scores={})
    if keep_going():
        own: dict[str, Score] = {}
        if spread.is_first:
            own = corpus_scores(hypotheses=decoded.outputs, references=decoded.references)
        shared = spread.share({key: score.as_dict() for key, score in own.items()})
        decoded.scores.update({key: Score(**fields) for key, fields in shared.items()})
    return decoded


def write_decodes(decoded: DecodedSet, *, directory: Path, name: str) -> None:
    """Writes NAME.hyp.txt (best texts), .ref.txt, .src.txt, .jsonl (n best with scores) and .scores.json."""

    def lines(texts: Sequence[str]) -> str:
        return "".join(text.replace("\n", " ") + "\n" for text in texts)

    write_atomically(directory / f"{name}.src.txt", lines(decoded.sources))
    write_atomically(directory / f"{name}.hyp.txt", lines(decoded.outputs))
    write_atomically(directory / f"{name}.jsonl", nbest_lines(decoded.sources, hypotheses=decoded.hypotheses))
    if decoded.references:
        write_atomically(directory / f"{name}.ref.txt", lines(decoded.references))
    scores = {key: score.as_dict() for key, score in decoded.scores.items()}
    write_atomically(directory / f"{name}.scores.json", json.dumps(scores, indent=1) + "\n")


def nbest_lines(sources: Sequence[str], *, hypotheses: Sequence[Sequence[TextHypothesis]]) -> str:
    """Returns one JSON object a line: source and hypotheses with score and logprob."""

    def number(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    return "".join(
        json.dumps(
            {
                "source": source,
                "hypotheses": [{"text": h.text, "score": number(h.score), "logprob": number(h.logprob)} for h in found],
            },
            ensure_ascii=False,
        )
        + "\n"
        for source, found in zip(sources, hypotheses, strict=True)
    )
