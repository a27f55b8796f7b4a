"""`megaseq bench`: without a GPU, with faults, and all of its way on the host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaseq.cli import bench
from megaseq.cli.main import main
from megaseq.kernels import catalogue, triton_runtime
from megaseq.kernels.bench import ledger, record
from megaseq.kernels.bench.record import Record
from megaseq.kernels.bench_case import BenchCase
from tests.kernels.bench.fakes import case, compared


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says how kernels run, for its whole process."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def host_as_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The benchmark takes the host for a GPU; the folder of its tables."""
    monkeypatch.setattr(bench, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(triton_runtime, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(triton_runtime, "architecture", lambda: 0)
    yield tmp_path / "tuned"
    triton_runtime.forget_tables()


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "gpu", lambda: None)
    assert main(["bench", "kernels"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "megaseq: bench kernels: the machine must have a CUDA GPU, but has none. Run it on one, or prove the kernels "
        "without timing them: megaseq bench kernels --check."
    ]


def test_check_proves_on_the_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "gpu", lambda: None)
    cases = [case("a"), case("b")]
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": cases})
    assert main(["bench", "kernels", "--check"]) == 0
    assert capsys.readouterr().out == "2 cases proven under the interpreter, 0 results wrong\n"
    cases.append(case("c", found=2.0))
    assert main(["bench", "kernels", "--check"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 cases proven under the interpreter, 1 results wrong"
    assert out[1].startswith("dropout: output of c is off by 1.0e+00")
    assert main(["bench", "kernels", "--check", "--cases", "b"]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--minutes", "-1"], "--minutes must be at least 0, but is -1.0"),
        (["--minutes", "nan"], "at least 0, but is nan"),
        (["--ops", "norn"], "--ops must name ops with benchmarks, but has norn"),
        (["--cases", "x"], "but is 'x'"),
    ],
)
def test_unknown_names(
    options: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": [case("a")]})
    assert main(["bench", "kernels", "--check", *options]) == 2
    assert text in capsys.readouterr().err


def whole_way(*options: str, out: Path) -> int:
    return main(["bench", "kernels", "--out", str(out), *options])


@pytest.fixture
def cases(host_as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> list[BenchCase]:
    """Cases that are timed; one more is only proven."""
    pytest.importorskip("triton")
    found = [case(candidates={"double": [triton_runtime.Config({"BLOCK": size}) for size in (16, 32)]})]
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": found})
    proven = BenchCase("dropout", "proven", lambda device: {"output": compared(1.0, 1.0)})
    monkeypatch.setattr(catalogue, "proof_cases", lambda: {"dropout": [proven]})
    return found


def only_record(out: Path) -> Record:
    (path,) = (path for path in out.glob("*.json") if not path.name.startswith("sm_"))
    return record.read(path)


def test_the_whole_way(
    cases: list[BenchCase], host_as_gpu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert whole_way("--tune", out=out) == 0
    text = capsys.readouterr().out
    assert "| dropout | shape |" in text and "2 cases proven on the GPU, 0 results wrong" in text
    found = only_record(out)
    assert found.machine.card == "host" and list(found.ops["dropout"].results) == ["shape"]
    assert found.ops["dropout"].proven == ["proven", "shape"]
    assert found.ops["dropout"].source == catalogue.source_hash("dropout")
    for folder in (host_as_gpu, out):
        assert set(json.loads((folder / "sm_0.json").read_text())["kernels"]) == {"double"}
    page = tmp_path / "page.md"
    page.write_text(f"# Kernels\n{ledger.START}\n{ledger.END}\n")
    assert main(["bench", "ledger", str(page), "--results", str(out)]) == 0
    assert "| dropout | shape |" in page.read_text()


def test_a_check_on_a_gpu_times_nothing(cases: list[BenchCase], tmp_path: Path) -> None:
    assert whole_way("--check", "--tune", out=tmp_path / "results") == 0
    found = only_record(tmp_path / "results").ops["dropout"]
    assert found.proven == ["proven", "shape"] and not found.results and not found.tuned


def test_a_wrong_kernel_is_not_timed(
    cases: list[BenchCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.append(case("wrong", found=3.0))
    assert whole_way(out=tmp_path / "results") == 1
    out = capsys.readouterr().out
    assert "| dropout | shape |" in out and "| dropout | wrong |" not in out
    assert "dropout: output of wrong is off by" in out


def test_what_the_time_was_too_short_for_is_done_later(
    cases: list[BenchCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert whole_way("--minutes", "0", out=out) == 3
    assert "steps are left: run the same command again to go on" in capsys.readouterr().out
    assert not only_record(out).ops
    assert whole_way("--minutes", "5", out=out) == 0
    before = only_record(out)
    assert whole_way("--minutes", "5", out=out) == 0
    assert only_record(out) == before
    assert whole_way("--fresh", out=out) == 0
    assert only_record(out).ops["dropout"].results != before.ops["dropout"].results
