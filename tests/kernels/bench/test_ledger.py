"""The ledger says of each kernel whether it has run, with this source or an older one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaseq.kernels import catalogue
from megaseq.kernels.bench import ledger, results
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


def keep_run(folder: Path, *, source: str) -> None:
    (folder / "run.json").write_text(results.to_json(MACHINE, results=[], hashes={"square": source}))


def test_before_and_after_a_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = tmp_path_factory.mktemp("runs")
    source = catalogue.source_hash("square")
    line = f"| `square` | square_kernel | `{source}` | "
    assert f"{line}never on a GPU |" in ledger.ledger(runs)
    assert "plain" not in ledger.ledger(runs)
    keep_run(runs, source=source)
    assert f"{line}H200 |" in ledger.ledger(runs)
    keep_run(runs, source="0123456789ab")
    assert f"{line}H200 (an older source) |" in ledger.ledger(runs)


def test_the_hash_is_that_of_the_source(folder: Path) -> None:
    before = catalogue.source_hash("square")
    assert before == catalogue.source_hash("square") != catalogue.source_hash("plain")
    (folder / "square/cases.py").write_text('"""Cases."""\n')
    assert catalogue.source_hash("square") == before
    (folder / "square/triton_kernels.py").write_text(KERNELS + "\n")
    assert catalogue.source_hash("square") != before


def test_a_page_keeps_its_text(tmp_path: Path) -> None:
    page = f"# Kernels\n\n{ledger.START}\nold\n{ledger.END}\n\nMore.\n"
    new = ledger.replaced(page, content="new")
    assert new == f"# Kernels\n\n{ledger.START}\n\nnew\n{ledger.END}\n\nMore.\n"
    with pytest.raises(KernelError, match="must have the lines"):
        ledger.replaced("# Kernels\n", content="new")
