"""SentencePiece: the same model from the same corpus, and sampling that depends on its seed alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaseq.base.errors import DataError
from megaseq.data import Vocabulary
from megaseq.data.tokenizer import Corpus, SentencePiece, Tokenizer, build

SYLLABLES = ("lo", "mi", "ra", "ten", "zu", "ber", "ga", "ni", "for", "dus")


def make_texts(size: int) -> list[str]:
    draw = random.Random(5)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randrange(1, 5))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=draw.randrange(3, 9))) for _ in range(size)]


TEXTS = make_texts(400)
CORPUS = Corpus("texts", lambda: iter(TEXTS))


def learn(**settings: Any) -> Tokenizer:
    return build(SentencePiece.Params(vocab_size=120, **settings), corpus=CORPUS)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def sampling(request: pytest.FixtureRequest) -> Tokenizer:
    return learn(model_type=request.param, sampling_alpha=0.2)


def digest(tokenizer: Tokenizer, seed: int | None) -> str:
    ids = [part.tolist() for part in tokenizer.encode_batch(TEXTS[:100], seed=seed)]
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def test_ids_and_round_trip() -> None:
    tokenizer = learn(tags=("<de>", "<fr>"))
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 120
    for text in TEXTS[:20]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([2, *ids, 3, 0, 0]) == text
        tagged = tokenizer.encode(f"<fr> {text}")
        assert tagged[1:] == ids and tagged[0] == 5
    assert tokenizer.decode([*tokenizer.encode(TEXTS[0]), 120, 127]) == TEXTS[0]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_learning_is_deterministic(model_type: str) -> None:
    first, second = learn(model_type=model_type), learn(model_type=model_type)
    assert first.save_files() == second.save_files()
    assert first.fingerprint() == second.fingerprint()


def test_byte_fallback() -> None:
    tokenizer = build(SentencePiece.Params(vocab_size=380, byte_fallback=True, model_type="bpe"), corpus=CORPUS)
    ids = tokenizer.encode("lo é€")
    assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == "lo é€"
    assert learn().unk_id in learn().encode("é")


def test_sampling_is_a_function_of_texts_and_seed(sampling: Tokenizer) -> None:
    best, first = digest(sampling, None), digest(sampling, 1)
    assert first not in (best, digest(sampling, 2))
    sampling.encode_batch(TEXTS, seed=77)
    sampling.num_threads = 2
    assert digest(sampling, 1) == first and digest(sampling, None) == best
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(digest(sampling, 1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [first] * 3
    for text, ids in zip(TEXTS[:100], sampling.encode_batch(TEXTS[:100], seed=1), strict=True):
        assert sampling.decode(ids.tolist()) == text


def _send(tokenizer: Tokenizer, send: Callable[[str], None]) -> None:
    tokenizer.encode_batch(TEXTS[:7], seed=3)
    send(digest(tokenizer, 1))


def test_sampling_is_the_same_in_other_processes(sampling: Tokenizer) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sampling, sender.send))
    process.start()
    assert receiver.recv() == digest(sampling, 1)
    process.join()


def test_without_alpha_a_seed_changes_nothing() -> None:
    tokenizer = learn()
    assert not tokenizer.samples and digest(tokenizer, 1) == digest(tokenizer, None)


def test_sampling_params_do_not_change_the_fingerprint() -> None:
    assert learn(sampling_alpha=0.3).fingerprint() == learn().fingerprint()


def test_load_a_model(tmp_path: Path) -> None:
    learnt = learn(tags=("<de>",))
    (tmp_path / "m.model").write_bytes(learnt.save_files()["sentencepiece.model"])
    p = SentencePiece.Params(data_dir=str(tmp_path), model_path="m.model", tags=("<de>",))
    assert build(p).encode(TEXTS[0]) == learnt.encode(TEXTS[0])
    assert build(p).fingerprint() == learnt.fingerprint()
    with pytest.raises(DataError, match=r"m\.model: must have the tag <fr> as a piece"):
        build(p.replace(tags=("<fr>",)))
    (tmp_path / "m.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.model: must be a SentencePiece model"):
        build(p)
    with pytest.raises(DataError, match=r"none: must be a readable file"):
        build(p.replace(model_path="none"))


def test_a_corpus_too_small() -> None:
    with pytest.raises(DataError, match=r"SentencePiece\.vocab_size: must suit the corpus, but is 5000: .*") as error:
        build(SentencePiece.Params(vocab_size=5000), corpus=CORPUS)
    assert "\n" not in str(error.value)
    fewer = build(SentencePiece.Params(vocab_size=5000, hard_vocab_limit=False), corpus=CORPUS)
    assert 50 < fewer.vocab_size < 5000


def test_a_corpus_too_small_names_the_params_of_the_run() -> None:
    p = Vocabulary.Params(source=SentencePiece.Params(vocab_size=5000), target=SentencePiece.Params(vocab_size=5000))
    assert p.target is not None
    for side, tokenizer in (("source", p.source), ("target", p.target)):
        with pytest.raises(DataError) as error:
            build(tokenizer, corpus=CORPUS)
        text = str(error.value)
        assert text.startswith(f"{side}.vocab_size: must suit the corpus, but is 5000: ")
        assert text.endswith(f"Set another {side}.vocab_size, or {side}.hard_vocab_limit=False.")


def test_the_limit_of_bpe_is_not_offered_to_be_lifted() -> None:
    with pytest.raises(DataError) as error:
        build(SentencePiece.Params(vocab_size=6, model_type="bpe"), corpus=CORPUS)
    assert str(error.value).endswith("Set another SentencePiece.vocab_size.")
