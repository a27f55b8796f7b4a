"""Sentences, suggestions, optional packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megaseq.base import DataError, MegaseqError, MissingPackageError, ParamsError, Problem, must, optional
from megaseq.base.errors import AsText, suggestion


def test_sentence() -> None:
    error = must("train.max_steps", "be positive", -1, "Set it to at least 1")
    assert isinstance(error, ParamsError)
    assert str(error) == "train.max_steps: must be positive, but is -1. Set it to at least 1."
    assert str(must("a", "be b", "c")) == "a: must be b, but is 'c'."
    assert str(must("a", "be b", AsText("missing"), "Is it?")) == "a: must be b, but is missing. Is it?"
    assert type(must("f:3", "be text", 1, kind=DataError)) is DataError
    assert len(str(must("a", "be short", "x" * 1000))) < 200
    assert str(Problem(path="a", rule="be b", value=1, remedy="Do.")) == "a: must be b, but is 1. Do."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("actuvation", "did you mean activation?"),
        ("ctivation", "did you mean activation?"),
        ("activatio", "did you mean activation?"),
        ("lrr", "did you mean lr?"),
        ("lt", "did you mean lr?"),
        ("DIM", "did you mean dim?"),
        ("zzzzz", "it has activation, dim, lr"),
    ],
)
def test_suggestion(name: str, expected: str) -> None:
    assert suggestion(name, ["activation", "dim", "lr"]) == expected


def test_every_error_is_a_megaseq_error() -> None:
    from megaseq.base import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 8 and all(issubclass(kind, MegaseqError) for kind in kinds)


def test_optional_returns_the_module_or_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional("json", needed_for="x").loads("1") == 1
    with pytest.raises(MissingPackageError) as caught:
        optional("megaseq_missing_package", needed_for="ZeRO")
    assert str(caught.value) == (
        "ZeRO: must have the package megaseq_missing_package, but is not installed. "
        "Run: pip install megaseq_missing_package."
    )
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingPackageError, match=r"Run: pip install 'deepspeed[<>=.,0-9]*>=[<>=.,0-9]*'"):
        optional("deepspeed", needed_for="ZeRO")
    (tmp_path / "megaseq_half.py").write_text("import megaseq_other_half\n")
    (tmp_path / "megaseq_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"it needs megaseq_other_half\. Run: pip install megaseq_other_half"):
        optional("megaseq_half", needed_for="x")
    with pytest.raises(MissingPackageError, match=r"broken \(ZeroDivisionError"):
        optional("megaseq_broken", needed_for="x")


def test_base_imports_no_torch() -> None:
    import subprocess

    code = "import sys, megaseq.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
