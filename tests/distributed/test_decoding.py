"""Texts are dealt out over data ranks on every layout; whatever the lengths, none waits for ever, and all come back."""

from __future__ import annotations

from typing import Any

import pytest

from megaseq.base import Configurable
from megaseq.data import Bytes, Vocabulary
from megaseq.decode import BeamSearch, Sampler
from megaseq.parallel.process import current_team
from megaseq.tasks.base import BaseTask
from megaseq.train.decoding import DecodedSet, decode_set
from megaseq.train.spread import Spread

from .harness import run_ranks
from .parity import Case, local_rows, make_engine, packed_batch

TEXTS = ["a", "a longer text than the others, by far", "bb", "", "some words", "c", "eleven chars", "d e f", "gg"]
SEARCHES: dict[str, Configurable.Params] = {
    # The limits are of each source, so that ranks end at very different steps.
    "beam": BeamSearch.Params(num_hyps_per_beam=2, target_seq_len=40, max_length_ratio=1.0, max_length_offset=1),
    "sampling": Sampler.Params(target_seq_len=30, max_length_ratio=1.0, max_length_offset=1),
}


def _decode_rank(rank: int, parallel: dict[str, Any], num_texts: int) -> dict[str, tuple[int, DecodedSet]]:
    """What each search has given, and how many sources this rank has decoded for it."""
    size = Bytes.Params().instantiate(files={}).vocab_size
    sizes = {"source_vocab_size": size, "target_vocab_size": size}
    engine = make_engine(Case(parallel=parallel, task=sizes), rank=rank)
    vocabulary: Vocabulary = Vocabulary.Params(source=Bytes.Params()).instantiate()
    spread = Spread(mesh=engine.mesh, team=current_team())
    found = {}
    for step, (name, search) in enumerate(SEARCHES.items()):
        engine.train_step(local_rows(packed_batch(step), mesh=engine.mesh), step=step)
        with engine.evaluating() as task:
            decoded = 0
            plain = task.decode

            def counting(source: Any, *, plain: Any = plain, **options: Any) -> Any:
                nonlocal decoded
                decoded += source.ids.shape[0]
                return plain(source, **options)

            object.__setattr__(task, "decode", counting)
            result = decode_set(
                task,
                sources=TEXTS[:num_texts],
                references=TEXTS[:num_texts],
                vocabulary=vocabulary,
                search=search,
                spread=spread,
            )
            object.__delattr__(task, "decode")
            assert isinstance(task, BaseTask)
        found[name] = (decoded, result)
    # Training goes on: nothing that evaluation gathered or waited for is left over.
    engine.train_step(local_rows(packed_batch(7), mesh=engine.mesh), step=2)
    return found


ZERO3 = {"zero.stage": 3, "zero.persistence_elements": 0}
LAYOUTS: list[Any] = [
    pytest.param({"data": 2}, 2, 9, id="dp2"),
    pytest.param({"data": 2, **ZERO3}, 2, 9, id="dp2-zero3"),
    pytest.param({"data": 2}, 2, 1, id="dp2-one-text"),
    pytest.param({"data": 4, **ZERO3}, 4, 5, id="dp4-zero3", marks=pytest.mark.slow),
    pytest.param({"data": 4}, 4, 2, id="dp4-two-texts", marks=pytest.mark.slow),
    pytest.param({"data": 2, "tensor": 2, **ZERO3}, 4, 9, id="dp2-tp2-zero3", marks=pytest.mark.slow),
    pytest.param({"data": 2, "tensor": 2, "sequence": True}, 4, 9, id="dp2-tp2-sequence", marks=pytest.mark.slow),
    pytest.param({"data": 2, "pipe": 2}, 4, 9, id="dp2-pp2", marks=pytest.mark.slow),
    pytest.param({"data": 2, "pipe": 2, "zero.stage": 1}, 4, 3, id="dp2-pp2-zero1", marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 2, **ZERO3}, 4, 9, id="dp2-cp2-zero3", marks=pytest.mark.slow),
    pytest.param(
        {"data": 2, "context": 2, "context_method": "ulysses"}, 4, 9, id="dp2-cp2-ulysses", marks=pytest.mark.slow
    ),
    pytest.param({"data": 2, "tensor": 2, "pipe": 2}, 8, 9, id="dp2-tp2-pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("parallel", "world_size", "num_texts"), LAYOUTS)
def test_ranks_share_the_texts_and_the_first_has_what_one_process_has(
    parallel: dict[str, Any], world_size: int, num_texts: int
) -> None:
    (alone,) = run_ranks(_decode_rank, world_size=1, arguments=({}, num_texts))
    ranks = run_ranks(_decode_rank, world_size=world_size, arguments=(parallel, num_texts), timeout_seconds=120)
    data, apart = parallel["data"], world_size // parallel["data"]
    for name, (_, expected) in alone.items():
        first = ranks[0][name][1]
        assert len({len(text) for text in expected.outputs}) > min(2, num_texts - 1), expected.outputs
        assert first.outputs == expected.outputs
        for got, wanted in zip(first.hypotheses, expected.hypotheses, strict=True):
            assert [h.score for h in got] == pytest.approx([h.score for h in wanted], rel=1e-4)
        assert all(rank[name][1].scores == expected.scores for rank in ranks)
        assert all(not any(rank[name][1].hypotheses) for rank in ranks[1:])
        counts = [rank[name][0] for rank in ranks]
        assert sum(counts) == num_texts * apart
        assert sum(count > 0 for count in counts) == min(data, num_texts) * apart, counts
