"""Sources: the pairs they stream, and the lines that they refuse."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megaseq.base.errors import DataError
from megaseq.data import GeneratedSource, Jsonl, ParallelText, Source, Tsv
from megaseq.data.source_files import FileDigests


def pairs(p: Source.Params) -> list[tuple[str, str]]:
    source: Source = p.instantiate()
    return [
        (a.decode(), b.decode()) for chunk in source.stream() for a, b in zip(chunk.source, chunk.target, strict=True)
    ]


def parallel(directory: Path, source: str = "*.de*", target: str = "*.en*") -> ParallelText.Params:
    return ParallelText.Params(data_dir=str(directory), source_files=source, target_files=target)


def fingerprint(p: Source.Params) -> str:
    source: Source = p.instantiate()
    return source.fingerprint(FileDigests(None))


def test_parallel_text_by_pattern_with_gzip_and_tag(tmp_path: Path) -> None:
    (tmp_path / "b.de").write_text("drei\n")
    (tmp_path / "b.en").write_text("three\n")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n"))
    (tmp_path / "a.en").write_text("one\ntwo")
    expected = [("eins", "one"), ("zwei", "two"), ("drei", "three")]
    assert pairs(parallel(tmp_path)) == expected
    assert pairs(parallel(tmp_path).replace(tag="<en>")) == [(f"<en> {a}", b) for a, b in expected]


@pytest.mark.parametrize(("source", "target", "place"), [(3, 5, "a.en:4"), (5, 3, "a.de:4"), (9000, 8999, "a.de:9000")])
def test_unequal_line_counts(tmp_path: Path, source: int, target: int, place: str) -> None:
    (tmp_path / "a.de").write_text("x\n" * source)
    (tmp_path / "a.en").write_text("y\n" * target)
    with pytest.raises(DataError) as error:
        pairs(parallel(tmp_path))
    text = str(error.value)
    assert place in text and f"line {min(source, target)} " in text and f"{max(source, target)} lines" in text
    assert "\n" not in text


def test_unequal_numbers_of_files(tmp_path: Path) -> None:
    for name in ("a.de", "b.de", "a.en"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(DataError, match=r"\*\.en\*: must match as many files as \*\.de\*, but is 1 files against 2"):
        pairs(parallel(tmp_path))


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\tde\ten\n1\teins "\tone\n2\tzwei\ttwo\textra\n')
    p = Tsv.Params(data_dir=str(tmp_path), files="a.tsv", source_column=2, target_column=1, has_header=True)
    assert pairs(p) == [("one", 'eins "'), ("two", "zwei")]
    with pytest.raises(DataError, match=r"a\.tsv:1: must have at least 4 tab-separated columns, but is a line of 3\."):
        pairs(Tsv.Params(data_dir=str(tmp_path), files="a.tsv", source_column=3))


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"translation": {"de": "eins\nzwei", "en": "one"}}, {"translation": {"de": "ü", "en": "u"}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    p = Jsonl.Params(data_dir=str(tmp_path), files="*.jsonl", source_key="translation.de", target_key="translation.en")
    assert pairs(p) == [("eins zwei", "one"), ("ü", "u")]
    for line, message in (
        ("{", "must be one JSON object, but is not JSON"),
        ('{"translation": {"de": "x"}}', "must have the key translation.en"),
        ("[1]", "must have the key translation.de"),
        ('{"translation": {"de": 3, "en": "x"}}', "must have a string at translation.de"),
        ('{"translation": {"de": "\\ud800", "en": "x"}}', "must have Unicode text at translation.de"),
        ("", "must be one JSON object"),
    ):
        path.write_text(json.dumps(rows[0]) + f"\n{line}\n")
        with pytest.raises(DataError) as error:
            pairs(p)
        assert f"a.jsonl:2: {message}" in str(error.value)
        assert "\n" not in str(error.value)


class Squares(GeneratedSource):
    def pairs(self, start: int, stop: int) -> list[tuple[str, str]]:
        return [(str(i), str(i * i)) for i in range(start, stop)]


def test_generated_source() -> None:
    p = Squares.Params(num_examples=20000)
    got = pairs(p)
    assert got[:3] == [("0", "0"), ("1", "1"), ("2", "4")] and len(got) == 20000 and got[-1] == ("19999", "399960001")
    assert fingerprint(p) == fingerprint(Squares.Params(num_examples=20000))
    assert fingerprint(p) != fingerprint(Squares.Params(num_examples=20001))
    with pytest.raises(DataError, match="Squares: must have at least one example"):
        pairs(Squares.Params(num_examples=0))


def test_fingerprint_follows_contents_and_rules_but_not_places(tmp_path: Path) -> None:
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.tsv").write_text("a\tb\tc\n")
    first = Tsv.Params(data_dir=str(tmp_path / "one"), files="a.tsv")
    second = Tsv.Params(data_dir=str(tmp_path / "two"), files="*.tsv")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(first.replace(target_column=2))
    assert fingerprint(first) != fingerprint(first.replace(tag="<x>"))
    (tmp_path / "two" / "a.tsv").write_text("a\tB\tc\n")
    assert fingerprint(first) != fingerprint(second)
