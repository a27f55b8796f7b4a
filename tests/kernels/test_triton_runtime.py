"""Triton's door: tables of tile sizes, overrides, reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.triton_runtime import Config


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for tables; nothing is remembered of it afterwards."""
    monkeypatch.setattr(triton_runtime, "TABLES", tmp_path)
    triton_runtime._table.cache_clear()
    yield tmp_path
    triton_runtime._table.cache_clear()


def test_a_table_is_asked_by_kernel_and_key(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "architecture", lambda: 90)
    entry = {"blocks": {"BLOCK_M": 128}, "num_warps": 8, "num_stages": 3}
    (tables / "sm_90.json").write_text(json.dumps({"kernels": {"norm": {"float32": entry}}}))
    default = Config({"BLOCK_M": 16})
    assert triton_runtime.config("norm", key="float32", default=default) == Config({"BLOCK_M": 128}, 8, 3)
    assert triton_runtime.config("norm", key="bfloat16", default=default) is default
    assert triton_runtime.config("other", key="float32", default=default) is default
    with triton_runtime.override(norm=Config({"BLOCK_M": 32})):
        assert triton_runtime.config("norm", key="float32", default=default).blocks == {"BLOCK_M": 32}
    assert triton_runtime.config("norm", key="float32", default=default).blocks == {"BLOCK_M": 128}


def test_what_is_asked_for_can_be_observed(tables: Path) -> None:
    default = Config({"BLOCK_M": 16})
    with triton_runtime.observed() as outer:
        triton_runtime.config("norm", key="float32", default=default)
        with triton_runtime.observed() as inner, triton_runtime.override(norm=default):
            triton_runtime.config("norm", key="bfloat16", default=default)
    triton_runtime.config("other", key="float32", default=default)
    assert inner == {("norm", "bfloat16")}
    assert outer == {("norm", "float32"), ("norm", "bfloat16")}


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.zeros(1)
    monkeypatch.setattr(triton_runtime, "installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "its kernels run on a GPU, not on cpu" in (triton_runtime.unable(host) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.unable(host) is None and triton_runtime.architecture() == 0
    assert "host memory" in (triton_runtime.unable(torch.zeros(1, device="meta")) or "")
    monkeypatch.setattr(triton_runtime, "installed", lambda: False)
    assert triton_runtime.unable(host) == "Triton is not installed"


def test_version_is_that_of_triton() -> None:
    pytest.importorskip("triton")
    assert ".".join(map(str, triton_runtime.version())) == ".".join(metadata.version("triton").split(".")[:2])


def test_the_interpreter_takes_no_launch_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Config({"BLOCK_M": 16}, num_warps=8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert found.arguments() == {"BLOCK_M": 16}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert found.arguments() == {"BLOCK_M": 16, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
