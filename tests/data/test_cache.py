"""The caches of texts and ids: keys, contents, real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest

import megaseq.data.cache as cache_module
from megaseq.data import Bytes, ParallelText, Tsv, Vocabulary
from megaseq.data.cache import TokenCache
from megaseq.data.text_store import TextStore

from .conftest import WriteCorpus, corpus_lines

FORK = multiprocessing.get_context("fork")


def open_both(p: ParallelText.Params | Tsv.Params, vocabulary: Vocabulary, cache_dir: Path) -> TokenCache:
    texts = TextStore.open(p.instantiate(), cache_dir=cache_dir)
    return TokenCache.open(texts, vocabulary=vocabulary, cache_dir=cache_dir)


def test_texts_ids_and_locations(tmp_path: Path, new_corpus: WriteCorpus, byte_vocabulary: Vocabulary) -> None:
    new_corpus(tmp_path, 10, name="a")
    p = new_corpus(tmp_path, 5, seed=1, name="b").replace(source_files="*.src", target_files="*.tgt")
    sources, targets = ([*one, *two] for one, two in zip(corpus_lines(10), corpus_lines(5, seed=1), strict=True))
    texts = TextStore.open(p.instantiate(), cache_dir=tmp_path / "cache")
    assert len(texts) == 15
    wanted = np.array([12, 0, 9, 14], dtype=np.int64)
    assert texts.read(wanted) == ([sources[i] for i in wanted], [targets[i] for i in wanted])
    assert [texts.location(i) for i in (0, 9, 10, 14)] == [
        f"{tmp_path}/a.src:1", f"{tmp_path}/a.src:10", f"{tmp_path}/b.src:1", f"{tmp_path}/b.src:5",
    ]  # fmt: skip
    tokens = TokenCache.open(texts, vocabulary=byte_vocabulary, cache_dir=tmp_path / "cache")
    ids, lengths = tokens.target.gather(wanted)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [token for i in wanted for token in byte_vocabulary.target.encode(targets[i])]
    assert lengths.tolist() == [len(targets[i]) for i in wanted]


def test_lines_after_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("src\ttgt\nx\ty\n")
    p = Tsv.Params(data_dir=str(tmp_path), files="a.tsv", has_header=True)
    assert TextStore.open(p.instantiate(), cache_dir=tmp_path).location(0) == f"{tmp_path}/a.tsv:2"


def test_key_follows_contents_and_tokenizer(
    tmp_path: Path, new_corpus: WriteCorpus, byte_vocabulary: Vocabulary
) -> None:
    p = new_corpus(tmp_path, 10)
    first = open_both(p, byte_vocabulary, tmp_path / "cache")
    assert open_both(p, byte_vocabulary, tmp_path / "cache").key == first.key
    copied = new_corpus(tmp_path / "elsewhere", 10, name="other")
    assert open_both(copied, byte_vocabulary, tmp_path / "cache").key == first.key
    other = Vocabulary.Params(source=Bytes.Params(tags=("<x>",))).instantiate()
    assert open_both(p, other, tmp_path / "cache").key != first.key
    new_corpus(tmp_path, 10, seed=1)
    assert open_both(p, byte_vocabulary, tmp_path / "cache").key != first.key


def test_wide_ids(tmp_path: Path, new_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bytes, "vocab_size", property(lambda self: 70_000))
    vocabulary = Vocabulary.Params(source=Bytes.Params()).instantiate()
    cache = open_both(new_corpus(tmp_path, 3), vocabulary, tmp_path / "cache")
    ids, _ = cache.source.gather(np.array([0], dtype=np.int64))
    assert ids.dtype == np.uint32 and ids.tolist() == vocabulary.source.encode(corpus_lines(3)[0][0])


def build_in_process(
    p: ParallelText.Params, vocabulary: Vocabulary, cache_dir: Path, log: Path, pause: float
) -> ForkProcess:
    """Starts a process that opens the cache; each tokenization is noted in `log` and takes `pause` seconds more."""
    write = cache_module.write_tokens

    def slowly(texts: TextStore, *, vocabulary: Vocabulary, directory: Path) -> None:
        write(texts, vocabulary=vocabulary, directory=directory)
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(pause)

    def run() -> None:
        cache_module.write_tokens = slowly
        open_both(p, vocabulary, cache_dir)

    process = FORK.Process(target=run)
    process.start()
    return process


def test_processes_at_the_same_time(tmp_path: Path, new_corpus: WriteCorpus, byte_vocabulary: Vocabulary) -> None:
    p, log = new_corpus(tmp_path, 20), tmp_path / "log"
    processes = [build_in_process(p, byte_vocabulary, tmp_path / "cache", log, 0.2) for _ in range(3)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_killed_in_the_middle(tmp_path: Path, new_corpus: WriteCorpus, byte_vocabulary: Vocabulary) -> None:
    p, log = new_corpus(tmp_path, 20), tmp_path / "log"
    process = build_in_process(p, byte_vocabulary, tmp_path / "cache", log, 60.0)
    while not log.exists() and process.is_alive():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    made = tmp_path / "cache" / "tokens"
    assert len(list(made.glob("*.tmp-*"))) == 1
    cache = open_both(p, byte_vocabulary, tmp_path / "cache")
    ids, _ = cache.source.gather(np.arange(20))
    assert bytes((ids - 4).astype(np.uint8)).decode() == "".join(corpus_lines(20)[0])
    assert not list(made.glob("*.tmp-*"))
