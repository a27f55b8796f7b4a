"""The vocabulary of a run: one joint tokenizer, or one for each side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from megaseq.base import Configurable
from megaseq.data.mixture import Mixture, components
from megaseq.data.order import permute
from megaseq.data.problem import data_error
from megaseq.data.source import Source
from megaseq.data.text_store import TextStore
from megaseq.data.tokenizer import Corpus, SentencePiece, Tokenizer, build

_READ_LINES = 8192


class Vocabulary(Configurable):
    """The tokenizers of source and target texts; one object for both where it is joint."""

    class Params(Configurable.Params):
        source: Tokenizer.Params = SentencePiece.Params()
        """Tokenizer of source texts, and of targets where `target` is None."""
        target: Tokenizer.Params | None = None
        """Tokenizer of target texts; None makes the vocabulary joint."""
        max_learning_lines: int = 2_000_000
        """Texts that a tokenizer learns from, at most; of a larger corpus it takes that many, evenly at random."""
        seed: int = 1
        """Chooses the texts to learn from."""

    params: Params
    source: Tokenizer
    target: Tokenizer

    def __init__(
        self,
        p: Params,
        *,
        files: Mapping[str, bytes] | None = None,
        learn_from: Source.Params | Mixture.Params | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Restores the tokenizers from `files`, or builds them.

        Args:
            p: Params.
            files: What `save_files` gave, from a run directory or checkpoint.
            learn_from: The training input's source, for tokenizers that learn.
            cache_dir: Where text and learnt tokenizers are kept, so that several processes make them once.

        Raises:
            DataError: Files are missing or damaged, or there is nothing to learn from.
        """
        super().__init__(p)
        if files is not None:
            self.source = _restore(p.source, files=files, side="source")
            self.target = self.source if p.target is None else _restore(p.target, files=files, side="target")
            return
        cache = None if cache_dir is None else Path(cache_dir)
        corpora = (
            _Corpora(p, source=learn_from, cache_dir=cache) if learn_from is not None and cache is not None else None
        )
        sides = ("source", "target") if p.target is None else ("source",)
        self.source = _build(p.source, corpora=corpora, sides=sides, cache_dir=cache)
        self.target = (
            self.source if p.target is None else _build(p.target, corpora=corpora, sides=("target",), cache_dir=cache)
        )

    @property
    def joint(self) -> bool:
        """Whether both sides have the same ids."""
        return self.target is self.source

    def save_files(self) -> dict[str, bytes]:
        """Returns what the constructor takes as `files`: names as `source.sentencepiece.model`."""
        files = {f"source.{name}": data for name, data in self.source.save_files().items()}
        if not self.joint:
            files.update({f"target.{name}": data for name, data in self.target.save_files().items()})
        return files

    def fingerprint(self) -> str:
        """A hash that changes with the ids of any text of either side."""
        both = f"{self.source.fingerprint()}/{self.target.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()

    def check_fingerprint(self, expected: str, *, where: str) -> None:
        """Raises DataError if the tokenizers are not those of the checkpoint or run `where`, with both fingerprints."""
        own = self.fingerprint()
        if own != expected:
            raise data_error(
                where,
                f"be used with the vocabulary that it was trained with, {expected[:16]}",
                f"given the vocabulary {own[:16]}",
                "Restore the tokenizer files that lie beside the checkpoint",
            )


def _restore(p: Tokenizer.Params, *, files: Mapping[str, bytes], side: str) -> Tokenizer:
    own = {name.removeprefix(f"{side}."): data for name, data in files.items() if name.startswith(f"{side}.")}
    tokenizer: Tokenizer = p.instantiate(files=own)
    return tokenizer


def _build(
    p: Tokenizer.Params, *, corpora: _Corpora | None, sides: tuple[str, ...], cache_dir: Path | None
) -> Tokenizer:
    # Only a tokenizer that learns needs the corpus, which reads the texts.
    learns = corpora is not None and p.cls.learns(p)
    return build(p, corpus=corpora.of(sides) if corpora is not None and learns else None, cache_dir=cache_dir)


class _Corpora:
    """Texts to learn from, read from the text caches of a source's components."""

    def __init__(self, p: Vocabulary.Params, *, source: Source.Params | Mixture.Params, cache_dir: Path) -> None:
        self._params = p
        self._components = [component.source for component in components(source)]
        self._cache_dir = cache_dir
        self._opened: list[TextStore] | None = None

    def _stores(self) -> list[TextStore]:
        if self._opened is None:
            self._opened = [TextStore.open(source, cache_dir=self._cache_dir) for source in self._components]
        return self._opened

    def of(self, sides: tuple[str, ...]) -> Corpus:
        """The corpus of one side or both; of both, first all sources and then all targets."""
        p = self._params
        identity = [p.max_learning_lines, p.seed, sides, [store.key for store in self._stores()]]
        fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        return Corpus(fingerprint, lambda: self._read(sides))

    def _read(self, sides: tuple[str, ...]) -> Iterator[str]:
        total = sum(map(len, self._stores())) * len(sides)
        for side in sides:
            for store in self._stores():
                size, wanted = len(store), len(store)
                if total > self._params.max_learning_lines:
                    wanted = max(1, size * self._params.max_learning_lines // total)
                places = permute(seed=self._params.seed, epoch=0, stream="tokenizer", size=size, stop=wanted)
                places.sort()
                for start in range(0, wanted, _READ_LINES):
                    for text in store.side(side).read(places[start : start + _READ_LINES]):
                        yield text.decode()
