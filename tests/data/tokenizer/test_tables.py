"""Bytes, characters and vocabulary files."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseq.base.errors import DataError
from megaseq.data.tokenizer import Bytes, Characters, Corpus, Tokenizer, VocabularyFile, build

TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def corpus(*texts: str) -> Corpus:
    return Corpus(repr(texts), lambda: iter(texts))


def restored(tokenizer: Tokenizer) -> Tokenizer:
    again: Tokenizer = tokenizer.params.instantiate(files=tokenizer.save_files())
    return again


@given(TEXT)
def test_bytes_give_every_text_back(text: str) -> None:
    tokenizer = build(Bytes.Params())
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode([2, *ids, 3, 0]) == text
    assert len(ids) == len(text.encode()) and all(4 <= i < 260 for i in ids)


def test_bytes_that_are_no_text() -> None:
    assert build(Bytes.Params()).decode([4 + 0xE4, 4 + ord("a"), 1]) == "\ufffda\ufffd"


def test_tags_lead_a_text_and_are_one_id_each() -> None:
    tokenizer = build(Bytes.Params(tags=("<de>", "<de", "<fr>")))
    assert tokenizer.vocab_size == 263
    a = 4 + ord("a")
    assert tokenizer.encode("<de> a") == [260, a]
    assert tokenizer.encode("<de> <fr> a") == [260, 262, a]
    assert tokenizer.encode("<fr>") == [262]
    assert tokenizer.encode("<de a") == [261, a]
    assert tokenizer.encode("<fr>a")[0] == 4 + ord("<")  # No space, so it is text.
    assert tokenizer.encode("a <de>") == [a, *(4 + b for b in b" <de>")]
    assert tokenizer.decode([260, a]) == "<de> a"


def test_characters_by_frequency() -> None:
    p = Characters.Params(tags=("<x>",))
    tokenizer = build(p, corpus=corpus("abba c", "aü\t\\"))
    assert tokenizer.vocab_size == 4 + 1 + 7
    ids = tokenizer.encode("<x> ab\t\\ ü?")
    assert ids[:3] == [4, 5, 6] and ids[-1] == tokenizer.unk_id
    assert tokenizer.decode(ids) == "<x>ab\t\\ ü\ufffd"
    again = restored(tokenizer)
    assert again.encode("<x> ab\t\\ ü?") == ids and again.fingerprint() == tokenizer.fingerprint()
    assert build(Characters.Params(max_size=6), corpus=corpus("aab")).vocab_size == 6
    with pytest.raises(DataError, match="Characters: must have a corpus to learn from"):
        build(p)


@given(st.lists(TEXT))
def test_characters_give_their_corpus_back(texts: list[str]) -> None:
    tokenizer = build(Characters.Params(), corpus=corpus(*texts, "a"))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_learnt_once_in_a_cache(tmp_path: Path) -> None:
    opened = []

    def open_texts() -> list[str]:
        opened.append(1)
        return ["ab"]

    learn_from = Corpus("one", lambda: iter(open_texts()))
    first = build(Characters.Params(), corpus=learn_from, cache_dir=tmp_path)
    second = build(Characters.Params(), corpus=learn_from, cache_dir=tmp_path)
    assert first.fingerprint() == second.fingerprint() and len(opened) == 1
    build(Characters.Params(max_size=9), corpus=learn_from, cache_dir=tmp_path)
    build(Characters.Params(), corpus=learn_from._replace(fingerprint="two"), cache_dir=tmp_path)
    assert len(opened) == 3


def vocabulary_file(directory: Path, text: bytes, **settings: str) -> Tokenizer:
    (directory / "vocab.txt").write_bytes(text)
    return build(VocabularyFile.Params(data_dir=str(directory), path="vocab.txt", **settings))


def test_vocabulary_file_split_at_spaces(tmp_path: Path) -> None:
    tokenizer = vocabulary_file(tmp_path, b"<pad>\nlo@@\t17\nwer\t3\nlow\n")
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("low lo@@ wer new") == [6, 4, 5, 1]
    assert tokenizer.decode([6, 4, 5, 1, 4]) == "low lower \ufffd lo"
    assert restored(tokenizer).encode("low") == [6]


def test_vocabulary_file_longest_piece(tmp_path: Path) -> None:
    pieces = ["\u2581a", "\u2581ab", "b", "c", *string.digits]
    tokenizer = vocabulary_file(tmp_path, "\n".join(pieces).encode(), split="longest")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abc  a1?")] == ["ab", "c", "a", "1", "\ufffd"]
    assert tokenizer.decode(tokenizer.encode("abc a1")) == "abc a1"
    assert tokenizer.encode("  ") == []
    other = vocabulary_file(tmp_path, "\n".join(pieces).encode())
    assert other.fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\n\nb\n", "vocabulary.txt:2: must hold a piece, but is empty"),
        (b"a\nb\na\n", "vocabulary.txt:3: must hold a piece that no other line has, but is 'a' again, first in line 1"),
        (b"a\n\xff\n", "vocabulary.txt:2: must be UTF-8"),
    ],
)
def test_bad_vocabulary_files(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        vocabulary_file(tmp_path, text)
    assert message in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: must be a readable file, but is not \(No such file"):
        build(VocabularyFile.Params(path=str(tmp_path / "none.txt")))
    with pytest.raises(DataError, match=r"Characters: must come with the file vocabulary\.txt, but is given no files"):
        Characters.Params().instantiate(files={})


def test_fingerprints_tell_tokenizers_apart() -> None:
    prints = {
        build(p, corpus=corpus("ab")).fingerprint()
        for p in (Bytes.Params(), Bytes.Params(tags=("<a>",)), Bytes.Params(tags=("<b>",)), Characters.Params())
    }
    assert len(prints) == 4
