"""Small corpora of which every example can be told by its text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from megaseq.data import Bytes, ParallelText, Vocabulary

# A shared machine may pause any example for longer than a deadline.
settings.register_profile("data", deadline=None)
settings.load_profile("data")

WriteCorpus = Callable[..., ParallelText.Params]


def corpus_lines(size: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Sources `number x x ...` and targets `number y ...` of random lengths."""
    random_ = random.Random(seed)
    sources = [f"{i}" + " x" * random_.randrange(8) for i in range(size)]
    targets = [f"{i}" + " y" * random_.randrange(6) for i in range(size)]
    return sources, targets


def write_corpus(directory: Path, size: int, *, seed: int = 0, name: str = "text") -> ParallelText.Params:
    """Writes such a corpus to two files."""
    sources, targets = corpus_lines(size, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.src").write_text("".join(f"{line}\n" for line in sources))
    (directory / f"{name}.tgt").write_text("".join(f"{line}\n" for line in targets))
    return ParallelText.Params(data_dir=str(directory), source_files=f"{name}.src", target_files=f"{name}.tgt")


@pytest.fixture(scope="session")
def byte_vocabulary() -> Vocabulary:
    """A joint vocabulary of bytes, which needs nothing to learn from."""
    vocabulary: Vocabulary = Vocabulary.Params(source=Bytes.Params()).instantiate()
    return vocabulary


@pytest.fixture(scope="session")
def new_corpus() -> WriteCorpus:
    """The function that writes corpora."""
    return write_corpus
