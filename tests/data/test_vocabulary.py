"""Joint and separate vocabularies, their files and their check against a checkpoint."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from megaseq.base.errors import DataError
from megaseq.data import Bytes, Characters, Mixture, ParallelText, SentencePiece, Vocabulary


def write(directory: Path, name: str = "a") -> ParallelText.Params:
    (directory / f"{name}.src").write_text("abc\ncab\n" * 20)
    (directory / f"{name}.tgt").write_text("xyz\nzzy\n" * 20)
    return ParallelText.Params(data_dir=str(directory), source_files=f"{name}.src", target_files=f"{name}.tgt")


def test_joint_learns_from_both_sides(tmp_path: Path) -> None:
    p = Vocabulary.Params(source=Characters.Params())
    vocabulary = p.instantiate(learn_from=write(tmp_path), cache_dir=tmp_path / "cache")
    assert vocabulary.joint and vocabulary.target is vocabulary.source
    assert vocabulary.source.unk_id not in vocabulary.source.encode("abcxyz")
    files = vocabulary.save_files()
    assert set(files) == {"source.vocabulary.txt"}
    assert p.instantiate(files=files).fingerprint() == vocabulary.fingerprint()


def test_separate_sides(tmp_path: Path) -> None:
    p = Vocabulary.Params(source=Bytes.Params(), target=Characters.Params())
    vocabulary = p.instantiate(learn_from=write(tmp_path), cache_dir=tmp_path / "cache")
    assert not vocabulary.joint
    assert vocabulary.target.encode("xa") == [vocabulary.target.encode("x")[0], vocabulary.target.unk_id]
    files = vocabulary.save_files()
    assert set(files) == {"target.vocabulary.txt"}
    again = p.instantiate(files=files)
    assert again.target.encode("xyz") == vocabulary.target.encode("xyz")
    again.check_fingerprint(vocabulary.fingerprint(), where="checkpoint")


def test_mismatch_says_both(tmp_path: Path) -> None:
    one = Vocabulary.Params(source=Bytes.Params()).instantiate()
    two = Vocabulary.Params(source=Bytes.Params(tags=("<a>",))).instantiate()
    with pytest.raises(DataError) as error:
        two.check_fingerprint(one.fingerprint(), where="run/checkpoints/step_00000010")
    text = str(error.value)
    assert text.startswith("run/checkpoints/step_00000010: must be used with the vocabulary")
    assert one.fingerprint()[:16] in text and two.fingerprint()[:16] in text and "\n" not in text


def test_large_corpora_are_sampled_the_same_each_time(tmp_path: Path) -> None:
    source = write(tmp_path)
    mixture = Mixture.Params(sources={"one": source, "two": write(tmp_path, "b").replace(tag="<b>")})
    p = Vocabulary.Params(source=Characters.Params(tags=("<b>",)), max_learning_lines=6)
    prints = {
        p.replace(**change).instantiate(learn_from=mixture, cache_dir=tmp_path / name).fingerprint()
        for name, change in (("c1", {}), ("c2", {}))
    }
    assert len(prints) == 1


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="Characters: must have a corpus to learn from"):
        Vocabulary.Params(source=Characters.Params()).instantiate()


def _learn(source: ParallelText.Params, cache: Path, result: Path) -> None:
    p = Vocabulary.Params(source=SentencePiece.Params(vocab_size=14, model_type="bpe"))
    result.write_text(p.instantiate(learn_from=source, cache_dir=cache).fingerprint())


def test_processes_learn_the_same_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path)
    context = multiprocessing.get_context("fork")
    results = [tmp_path / f"result{i}" for i in range(3)]
    processes = [context.Process(target=_learn, args=(source, tmp_path / "cache", result)) for result in results]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert len({result.read_text() for result in results}) == 1
    made = [path for path in (tmp_path / "cache" / "tokenizers").iterdir() if path.is_dir()]
    assert len(made) == 1
