"""The ledger says of each kernel whether it has run, with this source or an older one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaseq.kernels import catalogue
from megaseq.kernels.bench import ledger
from megaseq.kernels.bench.record import OpRecord, Record
from megaseq.kernels.bench.results import Machine
from megaseq.kernels.bench.timing import Ceiling
from megaseq.kernels.checks import KernelError

KERNELS = '''"""Kernels."""
@triton.jit
def _part(x):
    return x


@triton.jit(do_not_specialize=["Y"])
def square_kernel(X, Y):
    helper(X)


@triton.jit
def helper(x):
    return x


def launch(x, y):
    square_kernel[(1,)](x, y)
'''
MACHINE = Machine("H200", 90, {"triton": "3.6"}, "2026-01-02", Ceiling(1e12, 1e15))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of ops: one with kernels, one without."""
    for op in ("square", "plain"):
        (tmp_path / op).mkdir()
        (tmp_path / op / "__init__.py").write_text('"""An op."""\n')
    (tmp_path / "square/triton_kernels.py").write_text(KERNELS)
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    return tmp_path


def keep_run(folder: Path, *, source: str, wrong: dict[str, list[str]] | None = None) -> None:
    known = OpRecord(source, proven=["a"], kernels=["square_kernel"], wrong=wrong or {})
    Record(folder / "run.json", MACHINE, {"square": known}).save()


def test_before_and_after_a_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = tmp_path_factory.mktemp("runs")
    source = catalogue.source_hash("square")
    line = f"| `square` | `{source}` | square_kernel | "
    assert f"{line}never on a GPU |" in ledger.ledger(runs)
    assert "plain" not in ledger.ledger(runs)
    keep_run(runs, source=source)
    # Tables of tile sizes may lie beside the results.
    (runs / "sm_90.json").write_text("{}")
    assert f"{line}H200 |" in ledger.ledger(runs)
    keep_run(runs, source="0123456789ab", wrong={"b": ["off"]})
    assert f"{line}H200 (an older source, other cases are wrong) |" in ledger.ledger(runs)


def test_a_kernel_that_was_not_launched_has_not_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = tmp_path_factory.mktemp("runs")
    (folder / "square/more_kernels.py").write_text(KERNELS.replace("square_kernel", "cube_kernel"))
    keep_run(runs, source=catalogue.source_hash("square"))
    text = ledger.ledger(runs)
    assert "cube_kernel | never on a GPU |" in text and "square_kernel | H200 |" in text


def test_the_hash_is_that_of_the_source(folder: Path) -> None:
    before = catalogue.source_hash("square")
    assert before == catalogue.source_hash("square") != catalogue.source_hash("plain")
    (folder / "square/cases.py").write_text('"""Cases."""\n')
    assert catalogue.source_hash("square") == before
    (folder / "square/triton_kernels.py").write_text(KERNELS + "\n")
    assert catalogue.source_hash("square") != before


def test_the_hash_is_that_of_what_is_imported_too(folder: Path) -> None:
    (folder / "shared.py").write_text("from megaseq.kernels.plain import half\n")
    (folder / "dispatch.py").write_text("")
    # Inside of a function, as kernels are.
    (folder / "square/op.py").write_text(
        "def run():\n    from megaseq.kernels import shared\n    import megaseq.kernels.dispatch\n"
    )
    before = catalogue.source_hash("square")
    (folder / "dispatch.py").write_text("CHOICE = 1\n")
    assert catalogue.source_hash("square") == before
    (folder / "plain/__init__.py").write_text("half = 0.5\n")
    changed = catalogue.source_hash("square")
    assert changed != before
    (folder / "shared.py").write_text("third = 1 / 3\n")
    assert catalogue.source_hash("square") not in (before, changed)


def test_hashes_of_real_ops_have_the_kernels_that_they_share() -> None:
    def shares(op: str) -> set[str]:
        return {path.relative_to(catalogue.FOLDER).as_posix() for path in catalogue._sources(op)}

    assert {"rows.py", "triton_math.py", "quantize/triton_kernels.py"} <= shares("norm")
    assert "dropout/reference.py" in shares("attention")
    assert "activation/triton_kernels.py" in shares("scaled_linear")
    assert not {"attention/bench.py", "attention/cases.py", "dispatch.py"} & shares("attention")


@pytest.mark.parametrize(
    ("name", "words"), [("none.md", "No such file"), ("", "Is a directory"), ("raw.md", "not UTF-8")]
)
def test_a_page_that_cannot_be_read_is_one_sentence(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "raw.md").write_bytes(b"\xff\xfe")
    with pytest.raises(KernelError, match=rf"ledger: {tmp_path}.* must be a page of text, but is none \({words}"):
        ledger.write_ledger(tmp_path / name, folder=tmp_path)


def test_a_page_keeps_its_text(tmp_path: Path) -> None:
    page = f"# Kernels\n\n{ledger.START}\nold\n{ledger.END}\n\nMore.\n"
    new = ledger.replaced(page, content="new")
    assert new == f"# Kernels\n\n{ledger.START}\n\nnew\n{ledger.END}\n\nMore.\n"
    with pytest.raises(KernelError, match="must have the lines"):
        ledger.replaced("# Kernels\n", content="new")
