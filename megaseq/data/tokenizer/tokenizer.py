"""The interface of tokenizers: text to ids and back, with a fingerprint and files that travel with a checkpoint."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megaseq.base import Configurable
from megaseq.data.build_once import build_once, list_files
from megaseq.data.problem import data_error

Ids = npt.NDArray[np.int32]
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
NUM_SPECIAL = 4
LEARNING_VERSION = 1
"""Raised when learning gives other files from the same corpus."""
SPECIAL_PIECES = ("<pad>", "<unk>", "<s>", "</s>")


class Corpus(NamedTuple):
    """The texts that a tokenizer may learn from; `open` starts at the first at each call."""

    fingerprint: str
    open: Callable[[], Iterator[str]]


class Tokenizer(Configurable):
    """Turns text into ids without special ones, and back.

    All that decides the ids is in `files` and `params`: built once by `build`, kept in run directories and
    checkpoints, and given back to the constructor. A text may begin with reserved `tags`, as in `<de> good morning`;
    each becomes one id and the space behind it nothing.
    """

    class Params(Configurable.Params):
        tags: tuple[str, ...] = ()
        """Reserved pieces that lead a text, as `<de>`; each is one id that no other text gives."""

    params: Params
    num_threads: int = 1
    """Threads that encode a batch; makes no difference to the ids."""

    pad_id: int = PAD_ID
    unk_id: int = UNK_ID
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID

    def __init__(self, p: Params, *, files: Mapping[str, bytes]) -> None:
        super().__init__(p)
        self.files: dict[str, bytes] = dict(files)

    @classmethod
    def learns(cls, p: Params) -> bool:
        """Whether `make_files` learns from a corpus."""
        del p
        return False

    @classmethod
    def make_files(cls, p: Params, *, corpus: Corpus | None) -> dict[str, bytes]:
        """Returns the files that the constructor wants; learns them from `corpus` where they are learnt."""
        del p, corpus
        return {}

    @property
    def samples(self) -> bool:
        """Whether `encode_batch` with a seed draws random segmentations."""
        return False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are; ids are 0 to vocab_size - 1."""

    @abstractmethod
    def _encode(self, texts: Sequence[str], *, seed: int | None) -> list[Ids]:
        """Encodes texts without tags; samples segmentations with `seed` if it is given."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; pad, bos and eos ids are passed over."""

    @abstractmethod
    def _tag_id(self, tag: str) -> int:
        """Returns the id of one of `params.tags`."""

    def _identity(self) -> str:
        """What besides the files decides ids, as text."""
        return ""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without bos and eos."""
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str], *, seed: int | None = None) -> list[Ids]:
        """Encodes many texts.

        Args:
            texts: What to encode.
            seed: Where the tokenizer `samples`, draws a random segmentation of each text: a pure function of (texts,
                seed). None gives the best one.

        Returns:
            For each text its ids, int32 [tokens].
        """
        seed = seed if self.samples else None
        if not self.params.tags:
            return self._encode(texts, seed=seed)
        split = [self.split_tags(text) for text in texts]
        encoded = self._encode([text for _, text in split], seed=seed)
        return [
            np.concatenate([np.array([self._tag_id(tag) for tag in tags], dtype=np.int32), ids]) if tags else ids
            for (tags, _), ids in zip(split, encoded, strict=True)
        ]

    def split_tags(self, text: str) -> tuple[list[str], str]:
        """Returns the reserved tags that lead `text`, and the rest."""
        tags: list[str] = []
        found = True
        while found and text.startswith(self.params.tags):
            found = False
            for tag in self.params.tags:
                rest = text[len(tag) :]
                # `<d>` must not be read out of `<d>>x`, so a space or the end has to follow.
                if text.startswith(tag) and rest[:1] in ("", " "):
                    tags.append(tag)
                    text, found = rest[1:], True
                    break
        return tags, text

    def fingerprint(self) -> str:
        """A hash that two tokenizers share exactly if they give the same ids for every text, sampling aside."""
        digest = hashlib.sha256()
        for part in (type(self).__name__, self._identity(), *self.params.tags):
            digest.update(f"{len(part)}:{part}/".encode())
        for name in sorted(self.files):
            digest.update(f"{name}/{len(self.files[name])}/".encode())
            digest.update(self.files[name])
        return digest.hexdigest()

    def save_files(self) -> dict[str, bytes]:
        """Returns the files that `p.instantiate(files=...)` builds an equal tokenizer from."""
        return dict(self.files)

    def _file(self, name: str) -> bytes:
        """Returns one of the files; raises DataError if it was not given."""
        if name not in self.files:
            present = ", ".join(sorted(self.files)) or "no files"
            rule = f"come with the file {name}"
            raise data_error(type(self).__name__, rule, f"given {present}", "Restore the run's tokenizer files")
        return self.files[name]


def build(p: Tokenizer.Params, *, corpus: Corpus | None = None, cache_dir: Path | None = None) -> Tokenizer:
    """Builds the tokenizer that `p` describes: loads, or learns from `corpus`, what it needs.

    Args:
        p: Params of any tokenizer.
        corpus: Opens the texts to learn from.
        cache_dir: Where a learnt tokenizer is kept, so that several processes learn it once.

    Raises:
        DataError: Files are missing or damaged, or there is no corpus to learn from.
    """
    kind: type[Tokenizer] = p.cls
    if not kind.learns(p):
        return _instantiate(p, files=kind.make_files(p, corpus=corpus))
    if corpus is None:
        rule = "have a corpus to learn from"
        raise data_error(kind.__name__, rule, "built without one", "Give the training input's source")
    if cache_dir is None:
        return _instantiate(p, files=kind.make_files(p, corpus=corpus))

    def learn(directory: Path) -> None:
        for name, data in kind.make_files(p, corpus=corpus).items():
            (directory / name).write_bytes(data)

    text = json.dumps([LEARNING_VERSION, kind.__module__, kind.__name__, p.to_text(), corpus.fingerprint])
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    directory = build_once(cache_dir / "tokenizers" / key, build=learn, what=f"tokenizer {kind.__name__}")
    return _instantiate(p, files={name: (directory / name).read_bytes() for name in list_files(directory)})


def _instantiate(p: Tokenizer.Params, *, files: Mapping[str, bytes]) -> Tokenizer:
    tokenizer: Tokenizer = p.instantiate(files=files)
    return tokenizer


def read_file(path: str, *, data_dir: str) -> bytes:
    """Reads a tokenizer's file; raises DataError if that fails."""
    full = Path(data_dir).expanduser() / Path(path).expanduser()
    try:
        return full.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise data_error(str(full), "be a readable file", f"not ({reason})", "Check the path and data_dir") from None
