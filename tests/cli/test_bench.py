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
from megaseq.kernels.bench import ledger
from tests.kernels.bench.fakes import case


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
    [(["--ops", "norn"], "--ops must name ops with benchmarks, but has norn"), (["--cases", "x"], "but is 'x'")],
)
def test_unknown_names(
    options: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": [case("a")]})
    assert main(["bench", "kernels", "--check", *options]) == 2
    assert text in capsys.readouterr().err


def test_the_whole_way(host_as_gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from megaseq.kernels.bench import results

    sizes = [triton_runtime.Config({"BLOCK": size}) for size in (16, 32)]
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": [case(candidates={"double": sizes})]})
    out = tmp_path / "results"
    assert main(["bench", "kernels", "--tune", "--out", str(out)]) == 0
    where, found, sources = results.read(out / "host.json")
    assert where.card == "host" and [item.case for item in found] == ["shape"]
    assert sources == {"dropout": catalogue.source_hash("dropout")}
    assert set(json.loads((host_as_gpu / "sm_0.json").read_text())["kernels"]) == {"double"}
    page = tmp_path / "page.md"
    page.write_text(f"# Kernels\n{ledger.START}\n{ledger.END}\n")
    assert main(["bench", "ledger", str(page), "--results", str(out)]) == 0
    assert "| dropout | shape |" in page.read_text()


def test_a_wrong_kernel_is_not_timed(
    host_as_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(catalogue, "bench_cases", lambda: {"dropout": [case(found=3.0)]})
    assert main(["bench", "kernels", "--out", str(tmp_path / "results")]) == 2
    assert "Nothing was timed" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
