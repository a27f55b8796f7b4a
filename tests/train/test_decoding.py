"""Decoding of texts: the vocabulary's special tokens, and samples that do not depend on the batch."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from megaseq.data import Bytes, SentencePiece, Vocabulary
from megaseq.decode import GreedySearch, Sampler, Search
from megaseq.layers.base import bind, initialize
from megaseq.tasks.translation import Translation
from megaseq.train import parts
from megaseq.train.decoder import decode_lines
from megaseq.train.decoding import decode_texts, source_batch
from megaseq.train.saving import load_trained
from megaseq.train.trainer import Trainer

from .tiny import run_params, task_params, write_words

TEXTS = ["abc", "fedcba", "a", "bb", "cdcd", "eee", "fa", "abcdef", "dd", "c"]


def learn_like_t5(directory: Path) -> None:
    """Writes t5.model, which has the special tokens of T5: pad 0, eos 1, unk 2 and none that begins a text."""
    write_words(directory)
    model = io.BytesIO()
    lines = (directory / "train.in").read_text().splitlines() + (directory / "train.out").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=30, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (directory / "t5.model").write_bytes(model.getvalue())


def test_search_has_the_special_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    learn_like_t5(tmp_path)
    params = run_params(tmp_path, max_steps=60)
    params.vocabulary.source = SentencePiece.Params(data_dir=str(tmp_path), model_path="t5.model")
    params.train.eval_interval_steps = params.checkpoint.interval_steps = 60
    Trainer(params, run_dir=tmp_path / "run").fit()
    model = load_trained(tmp_path / "run")
    tokenizer = model.vocabulary.target
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 0)
    own = model.task.default_search()
    assert isinstance(own, Search.Params)
    assert (own.target_sos_id, own.target_eos_id) == (0, 1)
    # A search that says nothing of special tokens has the same ones.
    source = source_batch([[*tokenizer.encode(text), 1] for text in TEXTS], tokenizer=tokenizer)
    with model.evaluating() as task:
        for search in (own, GreedySearch.Params(target_seq_len=12)):
            found = [hypotheses[0] for hypotheses in task.decode(source, search=search)]
            assert any(hypothesis.ended and len(hypothesis.ids) < 11 for hypothesis in found)
            assert all(1 not in hypothesis.ids for hypothesis in found)


def test_search_of_an_override_has_them_too_and_set_ones_stay(tmp_path: Path) -> None:
    learn_like_t5(tmp_path)
    params = run_params(tmp_path)
    vocabulary: Vocabulary = Vocabulary.Params(
        source=Bytes.Params(), target=SentencePiece.Params(data_dir=str(tmp_path), model_path="t5.model")
    ).instantiate()
    params.task.set("search", Sampler.Params(target_sos_id=5))
    search = parts.task_params(params, vocabulary=vocabulary).get("search")
    assert (search.target_sos_id, search.target_eos_id) == (5, 1)
    assert params.task.get("search").target_eos_id is None


@pytest.fixture
def task() -> Translation:
    """A model with random weights over bytes."""
    size = Bytes.Params().instantiate(files={}).vocab_size
    made: Translation = task_params(source_vocab_size=size, target_vocab_size=size).instantiate()
    initialize(made, seed=1)
    bind(made, seed=1)
    return made.eval()


def test_samples_do_not_depend_on_the_batches(task: Translation) -> None:
    vocabulary: Vocabulary = Vocabulary.Params(source=Bytes.Params()).instantiate()
    search = Sampler.Params(num_samples=2, target_seq_len=6)

    def draw(texts: list[str], *, batch_tokens: int, first_key: int = 0) -> list[list[str]]:
        with torch.inference_mode():
            decoded = decode_texts(
                task, texts=texts, vocabulary=vocabulary, search=search, batch_tokens=batch_tokens, first_key=first_key
            )
        return [[hypothesis.text for hypothesis in found] for found in decoded]

    whole = draw(TEXTS, batch_tokens=2048)
    assert draw(TEXTS, batch_tokens=8) == draw(TEXTS, batch_tokens=20) == whole
    assert draw(TEXTS[4:], batch_tokens=2048, first_key=4) == whole[4:]
    same = draw(["abc"] * 10, batch_tokens=1)
    assert len({text for found in same for text in found}) == 20


def test_samples_of_lines_do_not_depend_on_how_many_are_read_at_once(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=1)
    params.train.eval_interval_steps = 1
    params.task.set("search", Sampler.Params(target_seq_len=6))
    Trainer(params, run_dir=tmp_path / "run").fit()
    whole = list(decode_lines(tmp_path / "run", lines=TEXTS))
    chunked = list(decode_lines(tmp_path / "run", lines=TEXTS, lines_at_once=3))
    assert [(source, found[0].text) for source, found in chunked] == [(s, found[0].text) for s, found in whole]
