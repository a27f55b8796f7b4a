"""All kernels compile for all architectures, fit, and take of them what the table says."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import gate
from tests.kernels.ahead_of_time.figures import SHARED_LIMIT, Row, problems
from tests.kernels.ahead_of_time.loops import loops

RIGHT = ["--cases", "tests.kernels.ahead_of_time.right"]
WRONG = ["--cases", "tests.kernels.ahead_of_time.wrong"]
ROW = Row("op", "case", "kernel", "f32", "BLOCK=16", 90, registers=32, spill_bytes=8, shared_bytes=1024, tensor_cores=0)


def test_a_row_within_its_limits_has_no_problem() -> None:
    assert problems(ROW, spill_budget=8, wants_tensor_cores=False) == []


def test_problems_of_a_row_are_named() -> None:
    (spills,) = problems(ROW, spill_budget=4, wants_tensor_cores=False)
    assert spills == "op: kernel of case (f32 BLOCK=16) on sm_90 spills 8 bytes, of 4 that its case allows"
    (slow,) = problems(ROW, spill_budget=8, wants_tensor_cores=True)
    assert slow.endswith("has no wgmma.mma_async, though its products are meant for tensor cores")
    large = dataclasses.replace(ROW, architecture=80, shared_bytes=SHARED_LIMIT[80] + 1, spill_bytes=0)
    (fits_not,) = problems(large, spill_budget=0, wants_tensor_cores=False)
    assert fits_not.endswith("takes 166913 bytes of shared memory, of 166912 that exist")


def test_tables_are_sorted_by_number() -> None:
    lines = [f"{op}\tb\tc\td\te\t{architecture}\t1\t2\t3\t4" for op in "ab" for architecture in (100, 80, 90)]
    tables = gate.tables(lines)
    assert list(tables) == ["a", "b"]
    for op, text in tables.items():
        header, *rows = [line.split("\t") for line in text.splitlines()]
        assert header == list(gate.COLUMNS)
        assert [(row[0], row[5]) for row in rows] == [(op, "80"), (op, "90"), (op, "100")]


def test_innermost_loops_are_counted() -> None:
    code = """
        .L_x_0:
                /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        .L_x_1:
                /*0010*/                   FADD R2, R2, R3 ;
                /*0020*/                   FMUL R2, R2, R3 ;
                /*0030*/              @!P0 BRA `(.L_x_1) ;
                /*0040*/               @P1 BRA `(.L_x_2) ;
                /*0050*/               @P2 BRA `(.L_x_0) ;
        .L_x_2:
                /*0060*/                   EXIT ;
    """
    assert loops(code, at_least=1) == [3]
    assert loops(code, at_least=4) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_right_kernels_pass_on_every_architecture() -> None:
    lines, wrong = gate.compile_for(gate.ARCHITECTURES, options=RIGHT)
    assert wrong == []
    rows = [dict(zip(gate.COLUMNS, line.split("\t"), strict=True)) for line in lines]
    cells = {(row["case"], row["architecture"], row["constants"]) for row in rows}
    doubled = {("elementwise", a, f"BLOCK={b}") for a in ("80", "90", "100") for b in (128, 256)}
    assert doubled <= cells and len(rows) == 3 + 6 + 4
    assert {row["architecture"] for row in rows if row["case"] == "fp8"} == {"90", "100"}
    products = [row for row in rows if row["kernel"] == "multiply"]
    assert len(products) == 3
    assert all(int(row["tensor_cores"]) and int(row["registers"]) and int(row["shared_bytes"]) for row in products)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_fault_is_named() -> None:
    lines, wrong = gate.compile_for((90,), options=WRONG)
    expected = (
        "case nothing launches no kernel",
        "changes_its_type of mistyped",
        "multiply of large",
        "holds_too_much of spills",
        "multiply of no_tensor_cores",
    )
    assert len(wrong) == len(expected), wrong
    for text in expected:
        assert any(text in line for line in wrong), (text, wrong)
    assert "does not compile" in wrong[1] and "shared memory" in wrong[2]
    assert "spills" in wrong[3] and "wgmma" in wrong[4]
    assert any("twice" in line for line in lines)


@pytest.mark.slow
def test_a_process_that_dies_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = {**gate.environment(), "PYTHONSTARTUP": "", "PYTHONHOME": os.devnull}
    monkeypatch.setattr(gate, "environment", lambda: killed)
    _, wrong = gate.compile_for((90,), options=RIGHT)
    assert len(wrong) == 1 and "the process for sm_90 died" in wrong[0]


@pytest.mark.slow
def test_a_search_whose_batch_shrinks_compiles_few_kernels() -> None:
    """A batch of 256 sources to 1, with caches that grow all the while."""
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time.variants"]
    done = subprocess.run(command, cwd=gate.ROOT, env=gate.environment(), capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout)
    assert counts.keys() == {"best_of_chunks", "merge_chunks", "attend_share", "add_shares"}
    # Three sizes of the merging program; one share or several, of caches with a table and without.
    assert counts["best_of_chunks"] == counts["add_shares"] == 1
    assert counts["merge_chunks"] == 3 and counts["attend_share"] <= 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_launched_on_small_cards_fits() -> None:
    assert gate.check_launched() == []


@pytest.mark.slow
def test_what_does_not_fit_a_small_card_is_named() -> None:
    wrong = gate.check_launched(options=WRONG)
    large = [line for line in wrong if "multiply of large" in line]
    assert len(large) == 2 and all("of 101376 that exist" in line for line in large)
    assert sum("changes_its_type" in line for line in wrong) == 2 and len(wrong) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_kernels_compile_to_what_the_tables_say() -> None:
    lines, wrong = gate.compile_for(gate.ARCHITECTURES)
    assert wrong == []
    kept, now = gate.kept(), gate.tables(lines)
    if not kept:
        pytest.skip(f"there are no tables for this version of Triton: {gate.COMMAND} writes them")
    changes = "\n".join(
        line
        for op in sorted(kept.keys() | now.keys())
        for line in difflib.unified_diff(
            kept.get(op, "").splitlines(), now.get(op, "").splitlines(), f"{op}, kept", "now", lineterm="", n=0
        )
    )
    assert not changes, f"the kernels changed; write the tables anew with\n  {gate.COMMAND}\nand look:\n{changes}"
