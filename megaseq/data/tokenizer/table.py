"""What tokenizers with a plain list of pieces share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from megaseq.base import REQUIRED
from megaseq.data.problem import data_error
from megaseq.data.tokenizer.tokenizer import (
    NUM_SPECIAL,
    SPECIAL_PIECES,
    UNK_ID,
    Corpus,
    Ids,
    Tokenizer,
    read_file,
)

VOCABULARY_FILE = "vocabulary.txt"


class TableTokenizer(Tokenizer):
    """Base of tokenizers that look pieces up in a list.

    Ids: pad, unk, bos, eos, then the tags, then the pieces in the order of the file `vocabulary.txt`, one a line.
    """

    class Params(Tokenizer.Params):
        pass

    params: Params

    def __init__(self, p: Params, *, files: Mapping[str, bytes]) -> None:
        super().__init__(p, files=files)
        own = [piece for piece in _pieces(self._file(VOCABULARY_FILE)) if piece not in SPECIAL_PIECES]
        self.pieces: tuple[str, ...] = (*SPECIAL_PIECES, *p.tags, *(piece for piece in own if piece not in p.tags))
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def _lookup(self, pieces: Sequence[str]) -> Ids:
        return np.array([self._ids.get(piece, UNK_ID) for piece in pieces], dtype=np.int32)

    def _kept(self, ids: Sequence[int]) -> Iterator[str]:
        """Pieces of `ids` without pad, bos and eos."""
        return (self.pieces[i] for i in ids if i >= NUM_SPECIAL or i == UNK_ID)

    def _tag_id(self, tag: str) -> int:
        return self._ids[tag]


class Characters(TableTokenizer):
    """Each Unicode character is one id; the alphabet is what the corpus has, the most frequent first."""

    class Params(TableTokenizer.Params):
        max_size: int = 4096
        """Ids at most, special ones and tags included; rarer characters are unknown."""

    params: Params

    @classmethod
    def learns(cls, p: Tokenizer.Params) -> bool:
        del p
        return True

    @classmethod
    def make_files(cls, p: Tokenizer.Params, *, corpus: Corpus | None) -> dict[str, bytes]:
        assert isinstance(p, Characters.Params)  # For the type checker: the params' class is bound to this one.
        assert corpus is not None  # `build` has seen to it.
        counts: Counter[str] = Counter()
        for text in corpus.open():
            counts.update(text)
        for tag in p.tags:
            counts.pop(tag, None)
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        kept = ranked[: max(0, p.max_size - NUM_SPECIAL - len(p.tags))]
        return {VOCABULARY_FILE: "".join(f"{escape(character)}\n" for character in kept).encode()}

    def _encode(self, texts: Sequence[str], *, seed: int | None) -> list[Ids]:
        del seed
        return [self._lookup(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the characters; an unknown one is U+FFFD."""
        return "".join("\ufffd" if piece == SPECIAL_PIECES[UNK_ID] else piece for piece in self._kept(ids))


class VocabularyFile(TableTokenizer):
    """Pieces listed in a file, one a line (what follows a tab is passed over); texts are split at spaces or by words.

    `split="space"` expects text that is already split, as subword-nmt leaves it, and undoes `joiner` in `decode`.
    `split="longest"` takes the longest piece at every place, with spaces as U+2581, as SentencePiece writes pieces.
    """

    class Params(TableTokenizer.Params):
        data_dir: str = ""
        """Directory that a relative `path` starts from; `--data-dir` fills it where it is empty."""
        path: str = REQUIRED
        """The file."""
        split: Literal["space", "longest"] = "space"
        """How a text is cut in pieces."""
        joiner: str = "@@"
        """For `space`: a piece that ends in this is joined to the next; empty for none."""

    params: Params

    def __init__(self, p: Params, *, files: Mapping[str, bytes]) -> None:
        super().__init__(p, files=files)
        self._longest = max(map(len, self.pieces))

    @classmethod
    def make_files(cls, p: Tokenizer.Params, *, corpus: Corpus | None) -> dict[str, bytes]:
        del corpus
        assert isinstance(p, VocabularyFile.Params)  # For the type checker: the params' class is bound to this one.
        return {VOCABULARY_FILE: read_file(p.path, data_dir=p.data_dir)}

    def _identity(self) -> str:
        return self.params.split

    def _encode(self, texts: Sequence[str], *, seed: int | None) -> list[Ids]:
        del seed
        if self.params.split == "space":
            return [self._lookup(text.split()) for text in texts]
        return [self._lookup(list(self._cut(text))) for text in texts]

    def _cut(self, text: str) -> Iterator[str]:
        text = "\u2581" + "\u2581".join(text.split()) if text.strip() else ""
        start = 0
        while start < len(text):
            for stop in range(min(len(text), start + self._longest), start, -1):
                if text[start:stop] in self._ids or stop == start + 1:
                    yield text[start:stop]
                    start = stop
                    break

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the pieces to text; an unknown piece is U+FFFD."""
        pieces = ("\ufffd" if piece == SPECIAL_PIECES[UNK_ID] else piece for piece in self._kept(ids))
        if self.params.split == "longest":
            return "".join(pieces).replace("\u2581", " ").strip()
        text = " ".join(pieces)
        joiner = self.params.joiner
        return text.replace(f"{joiner} ", "").removesuffix(joiner) if joiner else text


def escape(piece: str) -> str:
    """Writes a piece so that it stays on one line and is no comment of its own."""
    return "".join(f"\\u{{{ord(c):x}}}" if c in "\\\t\r\n" else c for c in piece)


def _unescape(piece: str) -> str:
    if "\\u{" not in piece:
        return piece
    head, *rest = piece.split("\\u{")
    return head + "".join(chr(int(code, 16)) + tail for code, _, tail in (part.partition("}") for part in rest))


def _pieces(data: bytes) -> list[str]:
    """Returns the pieces of a vocabulary file; raises DataError that names a bad line."""
    pieces: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        where = f"{VOCABULARY_FILE}:{number}"
        try:
            piece = _unescape(line.decode().rstrip("\r").split("\t")[0])
        except ValueError:
            raise data_error(where, "be UTF-8", repr(line[:20]), "Convert the file to UTF-8") from None
        if not piece:
            raise data_error(where, "hold a piece", "empty", "Remove the line")
        if piece in seen:
            value = f"{piece!r} again, first in line {seen[piece]}"
            raise data_error(where, "hold a piece that no other line has", value, "Remove one of them")
        seen[piece] = number
        pieces.append(piece)
    return pieces
