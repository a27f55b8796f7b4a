"""Faults of one line in attention's kernels: each is found by few cases of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.mutation import Mutant, problems

FORWARD, BACKWARD = "kernels/attention/triton_forward.py", "kernels/attention/triton_backward.py"
PARTS, TABLE, RANGES = (f"kernels/attention/{name}.py" for name in ("triton_parts", "bias_table", "ranges"))

NAMES = (
    "table_packed_causal",
    "table_far",
    "table_long_tile",
    "dropout_beyond_32_bits",
    "soft_cap_table",
    "far_window",
    "causal_more_keys",
    "table_far_from_all_keys",
    "head_80",
)
FILE = "tests/kernels/attention/test_triton.py"
TESTS = [
    *(f"{FILE}::test_equals_reference[{name}]" for name in NAMES),
    f"{FILE}::test_segments_in_any_order[any]",
    f"{FILE}::test_padding_on_one_side",
    f"{FILE}::test_parts_of_the_keys_are_joined",
    f"{FILE}::test_offsets_beyond_32_bits",
    f"{FILE}::test_biases_by_the_instruction",
]

MUTANTS = (
    Mutant("sums are not shrunk", FORWARD, "total * shrink[:, None]", "total"),
    Mutant("empty rows are not numbers", FORWARD, 'tl.where(highest == float("-inf"), 0.0, highest)', "highest"),
    Mutant("log-sum-exp of base 2", FORWARD, "weight, 1.0))) * LN_2", "weight, 1.0)))"),
    Mutant("output without mask", FORWARD, "mask=(m[:, None] < T) & (column[None, :] < HEAD)", "mask=m[:, None] < T"),
    Mutant(
        "far biases swapped",
        FORWARD,
        "tl.where(i < near - whole, before, after)",
        "tl.where(i < near - whole, after, before)",
    ),
    Mutant(
        "the right masked tiles are those behind",
        FORWARD,
        "tl.where(i < whole - begin, begin + i, whole_stop + i",
        "tl.where(i < whole - begin, begin + i, whole + i",
    ),
    Mutant("offsets of 32 bits", FORWARD, "m.to(tl.int64)[:, None] * q_st", "m[:, None] * q_st"),
    Mutant("no mean is taken off", BACKWARD, "ds = p * (dp - delta[:, None])", "ds = p * dp"),
    Mutant(
        "no gradient through the log-sum-exp",
        BACKWARD,
        "delta -= tl.load(OF_LOG_SUM",
        "delta += 0 * tl.load(OF_LOG_SUM",
    ),
    Mutant("the cap's slope is forgotten", BACKWARD, "        ds = ds * bend\n    dk", "        ds = ds\n    dk"),
    Mutant(
        "diagonals turn the other way",
        BACKWARD,
        "(pair % 8 - pair // 8 == diagonal)",
        "(pair // 8 - pair % 8 == diagonal)",
    ),
    Mutant(
        "blocks' diagonals turn the other way",
        BACKWARD,
        "(block % COLUMNS - block // COLUMNS) * 8",
        "(block // COLUMNS - block % COLUMNS) * 8",
    ),
    Mutant("far gradients swapped", BACKWARD, "left += tl.where(tile < near,", "left += tl.where(tile >= near_stop,"),
    Mutant(
        "near gradients of masked tiles",
        BACKWARD,
        "if (tile >= near) & (tile < near_stop):",
        "if (tile > near) & (tile < near_stop):",
    ),
    Mutant("first query head alone", BACKWARD, "h = key_head * GROUP + member", "h = key_head * GROUP"),
    Mutant(
        "seen from the keys, the window is mirrored",
        BACKWARD,
        "-shift, -high, -low, BLOCK_N",
        "-shift, low, high, BLOCK_N",
    ),
    Mutant("values' gradient is not scaled", BACKWARD, "dv = dv * inverse_kept", "dv = dv"),
    Mutant("dropout of the gradient alone", BACKWARD, "dropped = tl.where(kept, p, 0.0)", "dropped = p"),
    Mutant(
        "a causal tile too few",
        PARTS,
        "start + shift + high + 1, columns), 0)",
        "start + shift + high + 2, columns), 0)",
    ),
    Mutant(
        "tiles begin too late",
        PARTS,
        "begin = tl.maximum(start + shift + low, 0)",
        "begin = tl.maximum(last + shift + low, 0)",
    ),
    Mutant("whole tiles by the first granule", PARTS, "tl.max(tl.load(place + 2", "tl.min(tl.load(place + 2"),
    Mutant(
        "distances are not clamped",
        PARTS,
        "tl.minimum(tl.maximum(corner, first + low), first + width - 1 + high)",
        "tl.maximum(corner, first + low)",
    ),
    Mutant(
        "distances are clamped where some are near",
        PARTS,
        "(1 - ROWS, COLUMNS - 1) if KEYS_FIRST",
        "(0, 0) if KEYS_FIRST",
    ),
    Mutant(
        "biases of another row",
        PARTS,
        "of_register = known_column[None, :] - upper_row[:, None]",
        "of_register = known_column[None, :] + upper_row[:, None]",
    ),
    Mutant("the instruction loads elsewhere", PARTS, "+ 4 * of_register", "+ 2 * of_register"),
    Mutant(
        "zeros without other=",
        PARTS,
        "mask=(place[:, None] < stop) & (column[None, :] < HEAD), other=0.0",
        "mask=(place[:, None] < stop) & (column[None, :] < HEAD)",
    ),
    Mutant("the high word is that of the row's start", PARTS, "tl.where(column > limit, beyond, here)", "here"),
    Mutant("ends of a table are lost", TABLE, "inner[:, -1] += scaled[:, -TABLE_PAD:].sum(dim=1)", "pass"),
    Mutant("the run goes on", RANGES, "values[:, 1:] != values[:, :-1]", "values[:, 1:] < values[:, :-1]"),
    Mutant(
        "the range starts too late",
        RANGES,
        "torch.searchsorted(rising, own.least, out_int32=True)",
        "torch.searchsorted(rising, own.greatest, out_int32=True)",
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_fault_is_found(tmp_path: Path) -> None:
    assert problems(MUTANTS, tests=TESTS, folder=tmp_path) == []
