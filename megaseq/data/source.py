"""Where pairs of text come from: parallel text, TSV, JSONL and generated data, each read as one stream of chunks."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from megaseq.base import REQUIRED, Configurable
from megaseq.data.problem import data_error
from megaseq.data.source_files import FileDigests, Line, LineReader, match_files

CHUNK_PAIRS = 8192
"""Pairs read at a time; the unit of streaming, which bounds memory."""


class Chunk(NamedTuple):
    """Consecutive pairs of one file: UTF-8 texts without line ends; `line` is that of the first pair, from 1."""

    source: list[bytes]
    target: list[bytes]
    file: str
    line: int


class Source(Configurable):
    """A finite list of (source, target) texts that can be streamed from its beginning and has a fingerprint."""

    class Params(Configurable.Params):
        tag: str = ""
        """Put in front of every source text with a space, as `<de>`; the tokenizer must reserve it in its `tags`."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)

    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the files that locations refer to, in reading order; a made-up name for generated data."""

    @abstractmethod
    def read_chunks(self) -> Iterator[Chunk]:
        """Streams all pairs in order, without the tag. Raises DataError that names file and line."""

    @abstractmethod
    def identity(self, digests: FileDigests) -> object:
        """What decides the texts, as plain JSON data: contents of files and how they are read."""

    def stream(self) -> Iterator[Chunk]:
        """Streams all pairs in order, the tag in front of each source text."""
        if not self.params.tag:
            yield from self.read_chunks()
            return
        tag = self.params.tag.encode() + b" "
        for chunk in self.read_chunks():
            yield chunk._replace(source=[tag + text for text in chunk.source])

    def fingerprint(self, digests: FileDigests) -> str:
        """A hash that two sources share exactly if they stream the same texts by the same rules."""
        text = json.dumps([type(self).__name__, self.params.tag, self.identity(digests)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class ParallelText(Source):
    """Two sets of files, parallel by line; `.gz` is read through."""

    class Params(Source.Params):
        data_dir: str = ""
        """Directory that relative patterns start from; `--data-dir` fills it where it is empty."""
        source_files: str = REQUIRED
        """Pattern of the source files, as `train.*.de.gz`; read in sorted order."""
        target_files: str = REQUIRED
        """Pattern of the target files; the n-th belongs to the n-th source file."""

    params: Params

    def files(self) -> tuple[str, ...]:
        return tuple(source for source, _ in self._file_pairs())

    def _file_pairs(self) -> list[tuple[str, str]]:
        p = self.params
        sources = match_files(p.source_files, data_dir=p.data_dir)
        targets = match_files(p.target_files, data_dir=p.data_dir)
        if len(sources) != len(targets):
            raise data_error(
                p.target_files,
                f"match as many files as {p.source_files}",
                f"{len(targets)} files against {len(sources)} ({', '.join(targets[:3])} against {sources[0]})",
                "Make the patterns match files in pairs",
            )
        return list(zip(sources, targets, strict=True))

    def identity(self, digests: FileDigests) -> object:
        return [[digests.of(source), digests.of(target)] for source, target in self._file_pairs()]

    def read_chunks(self) -> Iterator[Chunk]:
        for source_file, target_file in self._file_pairs():
            with LineReader(source_file) as source, LineReader(target_file) as target:
                while True:
                    line = source.next_line
                    sources, targets = source.read(CHUNK_PAIRS), target.read(CHUNK_PAIRS)
                    if len(sources) != len(targets):
                        raise _unequal(source, target=target)
                    if not sources:
                        break
                    yield Chunk(sources, targets, source_file, line)


def _unequal(source: LineReader, *, target: LineReader) -> Exception:
    """The error for two files of unequal line count; both readers stand after the first chunk that differs."""
    longer, shorter = (source, target) if source.next_line > target.next_line else (target, source)
    end = shorter.next_line - 1
    return data_error(
        f"{longer.path}:{end + 1}",
        f"have a partner line in {shorter.path}",
        f"past its end, which is line {end} ({longer.path} has {longer.count_rest()} lines)",
        "Align the two files line by line",
    )


class _LineSource(Source):
    """Files with one pair a line."""

    class Params(Source.Params):
        data_dir: str = ""
        """Directory that relative patterns start from; `--data-dir` fills it where it is empty."""
        files: str = REQUIRED
        """Pattern of the files, as `train-*.tsv.gz`; read in sorted order."""

    params: Params

    def files(self) -> tuple[str, ...]:
        return tuple(match_files(self.params.files, data_dir=self.params.data_dir))

    def identity(self, digests: FileDigests) -> object:
        return [self._rules(), [digests.of(path) for path in self.files()]]

    def read_chunks(self) -> Iterator[Chunk]:
        for path in self.files():
            with LineReader(path) as reader:
                self._skip_header(reader)
                while True:
                    first = reader.next_line
                    lines = reader.read(CHUNK_PAIRS)
                    if not lines:
                        break
                    pairs = [self._parse(Line(path, first + i, text)) for i, text in enumerate(lines)]
                    yield Chunk([pair[0] for pair in pairs], [pair[1] for pair in pairs], path, first)

    def _skip_header(self, reader: LineReader) -> None:
        del reader

    @abstractmethod
    def _rules(self) -> object:
        """How a line is read, as plain data."""

    @abstractmethod
    def _parse(self, line: Line) -> tuple[bytes, bytes]:
        """Returns the pair of one line; raises DataError that names it."""


class Tsv(_LineSource):
    """Tab-separated columns, one pair a line, no quoting."""

    class Params(_LineSource.Params):
        source_column: int = 0
        """Column of the source text, from 0."""
        target_column: int = 1
        """Column of the target text, from 0."""
        has_header: bool = False
        """Whether the first line of each file names the columns and is passed over."""

    params: Params

    def _rules(self) -> object:
        return [self.params.source_column, self.params.target_column, self.params.has_header]

    def _skip_header(self, reader: LineReader) -> None:
        if self.params.has_header:
            reader.read(1)

    def _parse(self, line: Line) -> tuple[bytes, bytes]:
        p = self.params
        columns = line.text.split(b"\t")
        needed = max(p.source_column, p.target_column) + 1
        if len(columns) < needed:
            raise data_error(
                str(line),
                f"have at least {needed} tab-separated columns",
                f"a line of {len(columns)}",
                "Repair the line, or set source_column and target_column",
            )
        return columns[p.source_column], columns[p.target_column]


class Jsonl(_LineSource):
    """One JSON object a line."""

    class Params(_LineSource.Params):
        source_key: str = "source"
        """Key of the source text; dots go into nested objects, as `translation.de`."""
        target_key: str = "target"
        """Key of the target text."""

    params: Params

    def _rules(self) -> object:
        return [self.params.source_key, self.params.target_key]

    def _parse(self, line: Line) -> tuple[bytes, bytes]:
        try:
            value = json.loads(line.text)
        except ValueError as error:
            raise data_error(str(line), "be one JSON object", f"not JSON: {error}", "Repair the line") from None
        return self._text(line, value=value, key=self.params.source_key), self._text(
            line, value=value, key=self.params.target_key
        )

    @staticmethod
    def _text(line: Line, *, value: object, key: str) -> bytes:
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                keys = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
                raise data_error(str(line), f"have the key {key}", keys, "Set source_key and target_key")
            value = value[part]
        if not isinstance(value, str):
            raise data_error(str(line), f"have a string at {key}", repr(value)[:40], "Repair the line")
        try:
            # A text of several lines would not fit beside the lines of a reference file.
            return value.replace("\r\n", " ").replace("\n", " ").encode()
        except UnicodeEncodeError:
            rule = f"have Unicode text at {key}"
            raise data_error(str(line), rule, "a lone surrogate", "Repair the line") from None


class GeneratedSource(Source):
    """Base of data sets that are pure functions of an index.

    A subclass has `params.num_examples` and gives `pairs`; it raises `version` when its texts change, since the cache
    cannot see a change of code.
    """

    version = 1

    class Params(Source.Params):
        num_examples: int = REQUIRED
        """How many examples an epoch has."""

    params: Params

    @abstractmethod
    def pairs(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Returns the (source, target) texts of examples `start` to `stop`."""

    def files(self) -> tuple[str, ...]:
        return (type(self).__name__,)

    def identity(self, digests: FileDigests) -> object:
        del digests
        return [type(self).__module__, self.version, self.params.to_text()]

    def read_chunks(self) -> Iterator[Chunk]:
        total = self.params.num_examples
        if total < 1:
            rule = "have at least one example"
            raise data_error(type(self).__name__, rule, f"num_examples {total}", "Set num_examples")
        for start in range(0, total, CHUNK_PAIRS):
            pairs = self.pairs(start, min(start + CHUNK_PAIRS, total))
            texts = [(source.encode(), target.encode()) for source, target in pairs]
            yield Chunk([pair[0] for pair in texts], [pair[1] for pair in texts], self.files()[0], start + 1)
