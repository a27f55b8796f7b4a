"""What runs have found: kept as JSON after each step, found again, forgotten with another source."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megaseq.kernels.bench import record, results
from megaseq.kernels.bench.record import OpRecord, Record
from megaseq.kernels.bench.results import Machine, Result
from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.checks import KernelError
from megaseq.kernels.triton_runtime import Config

BEST = Ceiling(bytes_per_second=4e12, flops_per_second=8e14)
MACHINE = Machine("NVIDIA H200", 90, {"torch": "2.11.0+cu130", "triton": "3.6.0"}, "2026-01-02", BEST)
RESULT = Result(
    "norm", "large", 1e-3, 2e-4, 3 << 20, 0.5, "1 GB/s", {"plain": Measured(3e-3, 5), "flex": "no"}, {"plain": 1.5}
)


def known(source: str = "abc") -> OpRecord:
    return OpRecord(
        source,
        proven=["large"],
        kernels=["norm_kernel"],
        wrong={"small": ["off"]},
        fatal=["small"],
        begun={"huge": 1},
        tuned={"norm": {"half": Config({"ROWS": 4}, 8, 1)}},
        results={"large": RESULT},
    )


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    found = Record(tmp_path / "folder" / "run.json", MACHINE, {"norm": known()})
    found.save()
    assert record.read(found.path) == found
    assert [path.name for path in found.path.parent.iterdir()] == ["run.json"]


def test_another_source_begins_anew(tmp_path: Path) -> None:
    found = Record(tmp_path / "run.json", MACHINE, {"norm": known(), "rotary": known("def")})
    assert found.of("norm", source="abc").proven == ["large"]
    assert found.of("norm", source="new") == OpRecord("new")
    assert found.of("rotary", source="def") == known("def")
    found.forget(["rotary", "unheard of"])
    assert set(found.ops) == {"norm"}


def test_results_are_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    other = dataclasses.replace(RESULT, op="rotary")
    found = Record(tmp_path / "run.json", MACHINE, {"norm": known(), "rotary": known()})
    found.ops["rotary"].results = {"large": other}
    assert found.results(["rotary", "adamw", "norm"]) == [other, RESULT]


def test_a_file_for_each_card_and_version() -> None:
    path = record.path_of(Path("out"), card=MACHINE.card, versions=MACHINE.versions)
    assert path == Path("out/nvidia_h200_torch-2.11.0+cu130_triton-3.6.0.json")


def test_the_record_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(record, "ceiling", lambda device: measured.append(1) or BEST)
    host = torch.device("cpu")
    first = record.of_machine(host, folder=tmp_path)
    first.ops["norm"] = known()
    first.save()
    assert record.of_machine(host, folder=tmp_path) == first and measured == [1]
    here = results.machine(host)
    newer = dataclasses.replace(here, versions={**here.versions, "python": "4.0"})
    monkeypatch.setattr(record, "machine", lambda device: newer)
    assert record.of_machine(host, folder=tmp_path).ops == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}}', '{"machine": {"ceiling": 1}}', "\udcff"])
def test_a_file_of_something_else_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(KernelError, match=rf"bench: {path} must be as `megaseq bench kernels` wrote it") as caught:
        record.read(path)
    assert "\n" not in str(caught.value)
