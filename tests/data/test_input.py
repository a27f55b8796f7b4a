"""Inputs: every example exactly once, whatever the stops, ranks and workers; resuming; what is left out."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import NestedMap
from megaseq.base.errors import DataError
from megaseq.data import Bucketing, Bytes, Input, Mixture, Packing, ParallelText, SentencePiece, Vocabulary
from megaseq.data.plan import Batching

from .conftest import WriteCorpus, corpus_lines, write_corpus

SIZE = 61
BATCHINGS: dict[str, Batching.Params] = {
    "packing": Packing.Params(rows=3, source_length=40, target_length=36, window=25, lookahead=4),
    "buckets": Bucketing.Params(bucket_upper_bound=(6, 12, 30), bucket_batch_limit=(5, 4, 3), window=40),
    "tokens": Bucketing.Params(max_tokens=60, max_length=30, num_buckets=3, window=1000),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("input")


@pytest.fixture(scope="module")
def corpus(home: Path) -> ParallelText.Params:
    return write_corpus(home, SIZE)


def texts_of(batch: NestedMap, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs in a batch, read back from ids, in order; checks how the two sides are laid out."""
    found = []
    for row in range(batch.source.ids.shape[0]):
        segments = int(batch.source.segment_ids[row].max())
        assert int(batch.target.segment_ids[row].max()) == segments
        for segment in range(1, segments + 1):
            texts = []
            for ids, segment_ids, tokenizer in (
                (batch.source.ids, batch.source.segment_ids, vocabulary.source),
                (batch.target.labels, batch.target.segment_ids, vocabulary.target),
            ):
                mine = ids[row][segment_ids[row] == segment].tolist()
                assert mine[-1] == tokenizer.eos_id and tokenizer.eos_id not in mine[:-1]
                texts.append(tokenizer.decode(mine))
            found.append((texts[0], texts[1]))
    return found


def same(a: NestedMap, b: NestedMap) -> bool:
    pairs = zip(a.flatten_items(), b.flatten_items(), strict=True)
    return all(x[0] == y[0] and x[1].dtype == y[1].dtype and torch.equal(x[1], y[1]) for x, y in pairs)


def make(source: Any, vocabulary: Vocabulary, home: Path, *, rank: int = 0, ranks: int = 1, **settings: Any) -> Input:
    p = Input.Params(source=source, prefetch=settings.pop("prefetch", 0), **settings)
    made: Input = p.instantiate(vocabulary=vocabulary, cache_dir=home / "cache", data_rank=rank, data_ranks=ranks)
    return made


def one_epoch(inputs: list[Input]) -> list[list[NestedMap]]:
    """The batches of all ranks until the epoch ends."""
    epoch = inputs[0].position.epoch
    streams = [iter(each) for each in inputs]
    steps = []
    while inputs[0].position.epoch == epoch:
        steps.append([next(stream) for stream in streams])
    return steps


@settings(max_examples=20)
@given(data=st.data())
def test_every_example_once_an_epoch_over_stops_and_rank_counts(
    data: st.DataObject, corpus: ParallelText.Params, byte_vocabulary: Vocabulary, home: Path
) -> None:
    batching = BATCHINGS[data.draw(st.sampled_from(sorted(BATCHINGS)))]
    seed = data.draw(st.integers(0, 3))
    expected = list(zip(*corpus_lines(SIZE), strict=True))
    reference = make(corpus, byte_vocabulary, home, batching=batching, seed=seed)
    whole = [step[0] for step in one_epoch([reference]) + one_epoch([reference])]
    state: dict[str, Any] | None = None
    passed: list[tuple[str, str]] = []
    at = 0
    while at < len(whole):
        ranks = data.draw(st.integers(1, 4))
        prefetch = data.draw(st.sampled_from([0, 2]))
        inputs = [
            make(corpus, byte_vocabulary, home, batching=batching, seed=seed, rank=r, ranks=ranks, prefetch=prefetch)
            for r in range(ranks)
        ]
        if state is not None:
            for each in inputs:
                each.load_state_dict(state)
        streams = [iter(each) for each in inputs]
        for _ in range(min(len(whole) - at, data.draw(st.integers(1, 15)))):
            parts = [next(stream) for stream in streams]
            assert len({tuple(part.source.ids.shape) + tuple(part.target.ids.shape) for part in parts}) == 1
            pairs = [pair for part in parts for pair in texts_of(part, byte_vocabulary)]
            assert sorted(pairs) == sorted(texts_of(whole[at], byte_vocabulary))
            passed += pairs
            at += 1
        states = [each.state_dict() for each in inputs]
        assert all(each == states[0] for each in states)
        state = pickle.loads(pickle.dumps(states[0]))
    assert Counter(passed) == Counter({pair: 2 for pair in expected})


def test_epochs_and_seeds_differ(corpus: ParallelText.Params, byte_vocabulary: Vocabulary, home: Path) -> None:
    orders = []
    for seed in (1, 2):
        inp = make(corpus, byte_vocabulary, home, batching=BATCHINGS["packing"], seed=seed)
        for _ in range(2):
            orders.append([pair for step in one_epoch([inp]) for pair in texts_of(step[0], byte_vocabulary)])
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("batching", ["packing", "buckets"])
def test_workers_and_threads_change_nothing(
    corpus: ParallelText.Params, byte_vocabulary: Vocabulary, home: Path, batching: str
) -> None:
    plain = make(corpus, byte_vocabulary, home, batching=BATCHINGS[batching])
    wanted, states = [], []
    for batch in islice(plain, 50):
        wanted.append(batch)
        states.append(plain.state_dict())
    for workers, prefetch in ((0, 3), (1, 2), (2, 2)):
        inp = make(corpus, byte_vocabulary, home, batching=BATCHINGS[batching], num_workers=workers, prefetch=prefetch)
        for i, batch in enumerate(islice(inp, 17)):
            assert same(batch, wanted[i]) and inp.state_dict() == states[i]
        # A second iterator goes on where the first stopped, and so does another input from the state.
        again = make(corpus, byte_vocabulary, home, batching=BATCHINGS[batching], num_workers=workers, prefetch=0)
        again.load_state_dict(inp.state_dict())
        for stream in (inp, again):
            for i, batch in enumerate(islice(stream, 20), 17):
                assert same(batch, wanted[i])


def test_state_is_small_and_checked(corpus: ParallelText.Params, byte_vocabulary: Vocabulary, home: Path) -> None:
    inp = make(corpus, byte_vocabulary, home, batching=BATCHINGS["packing"])
    state = inp.state_dict()
    assert all(isinstance(value, int | str) for value in state.values()) and len(str(state)) < 250
    for change in ({"seed": 2}, {"batching": BATCHINGS["tokens"]}, {"max_source_length": 12}):
        other = make(corpus, byte_vocabulary, home, **{"batching": BATCHINGS["packing"], **change})
        with pytest.raises(DataError, match="train_input: must be what the checkpoint was trained on"):
            other.load_state_dict(state)
    make(corpus, byte_vocabulary, home, batching=BATCHINGS["packing"], num_workers=2).load_state_dict(state)


def test_what_is_left_out_is_counted_and_reported(
    tmp_path: Path, byte_vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["ab", "", "a" * 10, "c", "   ", "a" * 9, "d" * 8]
    (tmp_path / "a.src").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "a.tgt").write_text("x\n" * 3 + "y" * 12 + "\n" + "x\n" * 3)
    p = ParallelText.Params(data_dir=str(tmp_path), source_files="a.src", target_files="a.tgt")
    packing = Packing.Params(rows=2, source_length=9, target_length=9)
    with caplog.at_level(logging.WARNING):
        inp = make(p, byte_vocabulary, tmp_path, batching=packing, max_source_length=10, max_target_length=12)
    assert inp.stats == {"examples": 7, "dropped_empty": 1, "dropped_too_long": 2, "dropped_unbatched": 1}
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"1 of 7 pairs have an empty side and are left out: {tmp_path}/a.src:2",
        f"2 of 7 pairs are longer than 10 or 12 tokens and are left out: {tmp_path}/a.src:3, {tmp_path}/a.src:4",
        f"1 of 7 pairs have no room in the training batches and are left out: {tmp_path}/a.src:6",
    ]
    seen = [pair for step in one_epoch([inp]) for pair in texts_of(step[0], byte_vocabulary)]
    assert sorted(seen) == [("   ", "x"), ("ab", "x"), ("d" * 8, "x")]
    evaluated = [pair for batch in inp.epoch_batches() for pair in texts_of(batch, byte_vocabulary)]
    assert sorted(evaluated) == [("   ", "x"), ("a" * 9, "x"), ("ab", "x"), ("d" * 8, "x")]


def test_truncate_and_keep_empty(tmp_path: Path, byte_vocabulary: Vocabulary) -> None:
    (tmp_path / "a.src").write_text("\nabcdef\nab\n")
    (tmp_path / "a.tgt").write_text("u\nv\n\n")
    p = ParallelText.Params(data_dir=str(tmp_path), source_files="a.src", target_files="a.tgt")
    inp = make(p, byte_vocabulary, tmp_path, max_source_length=4, too_long="truncate", empty="keep")
    (batch,) = inp.epoch_batches()
    numbers = batch.example_ids.tolist()
    assert sorted(zip(numbers, texts_of(batch, byte_vocabulary), strict=True)) == [
        (0, ("", "u")), (1, ("abc", "v")), (2, ("ab", "")),
    ]  # fmt: skip
    assert inp.texts(batch.example_ids) == tuple(
        [lines[i] for i in numbers] for lines in (["", "abcdef", "ab"], ["u", "v", ""])
    )


def test_nothing_left(tmp_path: Path, byte_vocabulary: Vocabulary) -> None:
    (tmp_path / "a.src").write_text("long\n\n")
    (tmp_path / "a.tgt").write_text("x\nx\n")
    p = ParallelText.Params(data_dir=str(tmp_path), source_files="a.src", target_files="a.tgt")
    with pytest.raises(DataError) as error:
        make(p, byte_vocabulary, tmp_path, max_source_length=2)
    counts = "examples 2, dropped_empty 1, dropped_too_long 1"
    remedy = "Raise the limits on lengths"
    assert str(error.value) == f"{tmp_path}/a.src: must leave at least one pair, but is none ({counts}). {remedy}."


@settings(max_examples=20)
@given(ranks=st.integers(1, 4), max_rows=st.none() | st.integers(1, 7), batching=st.sampled_from(sorted(BATCHINGS)))
def test_evaluation_sees_every_example_once(
    ranks: int,
    max_rows: int | None,
    batching: str,
    corpus: ParallelText.Params,
    byte_vocabulary: Vocabulary,
    home: Path,
) -> None:
    sources, targets = corpus_lines(SIZE)
    seen = []
    counts = set()
    for rank in range(ranks):
        inp = make(corpus, byte_vocabulary, home, batching=BATCHINGS[batching], rank=rank, ranks=ranks)
        batches = list(inp.epoch_batches(max_rows=max_rows))
        counts.add(tuple(tuple(batch.source.ids.shape) for batch in batches))
        for batch in batches:
            numbers = [number for number in batch.example_ids.tolist() if number >= 0]
            pairs = [(sources[i], targets[i]) for i in numbers]
            assert texts_of(batch, byte_vocabulary) == pairs
            assert inp.texts(batch.example_ids) == ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
            seen += numbers
        assert inp.num_eval_examples == SIZE
    assert sorted(seen) == list(range(SIZE)) and len(counts) == 1


def test_mixture(tmp_path: Path, byte_vocabulary: Vocabulary, new_corpus: WriteCorpus) -> None:
    small = new_corpus(tmp_path, 6, name="small").replace(tag="<s>")
    large = new_corpus(tmp_path, 30, name="large")
    mixture = Mixture.Params(sources={"small": small, "large": large}, weights={"small": 1.0, "large": 2.0})
    with pytest.raises(
        DataError, match="source tag <s>: must be reserved in the source tokenizer, but is not among no"
    ):
        make(mixture, byte_vocabulary, tmp_path)
    vocabulary = Vocabulary.Params(source=Bytes.Params(tags=("<s>",))).instantiate()
    inp = make(mixture, vocabulary, tmp_path, batching=BATCHINGS["packing"])
    assert inp.num_examples == 36
    seen: Counter[str] = Counter()
    for _ in range(5):
        seen.update(pair[0] for step in one_epoch([inp]) for pair in texts_of(step[0], vocabulary))
    small_counts = [count for text, count in seen.items() if text.startswith("<s>")]
    large_counts = [count for text, count in seen.items() if not text.startswith("<s>")]
    assert small_counts == [10] * 6  # 12 draws an epoch, five epochs, six examples.
    assert sum(large_counts) == 120 and set(large_counts) == {4}
    numbers = np.concatenate([batch.example_ids.numpy() for batch in inp.epoch_batches()])
    assert sorted(numbers.tolist()) == list(range(36))
    assert inp.texts([0, 35])[0][0].startswith("<s> 0") and inp.texts([0, 35])[0][1].startswith("29")
    assert inp.location(6) == f"{tmp_path}/large.src:1"


def test_segmentations_are_drawn_anew_each_epoch_and_resume(tmp_path: Path, new_corpus: WriteCorpus) -> None:
    source = new_corpus(tmp_path, 40)
    tokenizer = SentencePiece.Params(vocab_size=40, model_type="bpe", sampling_alpha=0.5)
    vocabulary = Vocabulary.Params(source=tokenizer).instantiate(learn_from=source, cache_dir=tmp_path / "cache")
    packing = Packing.Params(rows=3, source_length=24, target_length=24, window=17)
    first = make(source, vocabulary, tmp_path, batching=packing)
    expected = sorted(zip(*corpus_lines(40), strict=True))
    epochs = []
    for _ in range(2):
        batches = [step[0] for step in one_epoch([first])]
        assert sorted(pair for batch in batches for pair in texts_of(batch, vocabulary)) == expected
        epochs.append(sum(int((batch.source.segment_ids > 0).sum()) for batch in batches))
    plain = make(source, vocabulary, tmp_path, batching=packing, sample_segmentations=False)
    best = sum(int((step[0].source.segment_ids > 0).sum()) for step in one_epoch([plain]))
    assert epochs[0] != epochs[1] and min(epochs) > best
    # In evaluation they are the best ones.
    evaluated = sum(int((batch.source.segment_ids > 0).sum()) for batch in first.epoch_batches())
    assert evaluated == best
    second = make(source, vocabulary, tmp_path, batching=packing)
    stream = iter(second)
    for _ in range(11):
        next(stream)
    third = make(source, vocabulary, tmp_path, batching=packing, prefetch=2)
    third.load_state_dict(second.state_dict())
    for batch, again in islice(zip(stream, third, strict=False), 20):
        assert same(batch, again)


def test_ranks_are_checked(corpus: ParallelText.Params, byte_vocabulary: Vocabulary, home: Path) -> None:
    with pytest.raises(DataError, match="Input: must have a data_rank below data_ranks, but is rank 2 of 2"):
        make(corpus, byte_vocabulary, home, rank=2, ranks=2)
