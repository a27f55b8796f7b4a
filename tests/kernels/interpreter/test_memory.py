"""Each fault that the interpreter must find is found; right kernels pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from megaseq.kernels import triton_runtime
from tests.kernels.interpreter import kernels
from tests.kernels.interpreter.poison import untouched_memory

pytestmark = pytest.mark.skipif(not triton_runtime.interpreted(), reason="looks into the interpreter")


@pytest.fixture(autouse=True)
def _interpreter(device: torch.device) -> None:
    """All tests here run under the watched interpreter with poisoned memory."""


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def adjacent() -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors side by side in memory."""
    both = zeros(200)
    return both[:100], both[100:]


def test_right_kernels_pass() -> None:
    x, y = torch.arange(100.0), torch.empty(100)
    kernels.scale[(2,)](x, y, 100, 2.0, 0, BLOCK=64)
    assert torch.equal(y, 2 * x)
    kernels.overlapping_blocks[(4,)](x, y, 16, BLOCK=16)
    kernels.in_place[(2,)](x, 100, BLOCK=64)
    assert torch.equal(x, torch.arange(100.0) + 2)
    kernels.duplicates[(1,)](torch.zeros(64, dtype=torch.int32), 64, BLOCK=64)


FAULTS: dict[str, tuple[str, Callable[[], object]]] = {
    "read behind": (
        r"out-of-bounds load in 1 lanes, first at byte 400 of X, which has 400 \(scale at \(1, 0, 0\) of the grid\)",
        lambda: kernels.scale[(2,)](zeros(100), zeros(100), 100, 2.0, 1, BLOCK=64),
    ),
    "read before": (
        r"out-of-bounds load in 3 lanes, first at byte -12 of X, which has 400 \(scale at \(0, 0, 0\)",
        lambda: kernels.scale[(2,)](zeros(100), zeros(100), 100, 2.0, -3, BLOCK=64),
    ),
    "read of the neighbour's memory": (
        r"out-of-bounds load in 1 lanes, first at byte 400 of X",
        lambda: kernels.scale[(2,)](*adjacent(), 100, 2.0, 1, BLOCK=64),
    ),
    "read far away": (
        r"out-of-bounds load in 64 lanes",
        lambda: kernels.scale[(2,)](zeros(100), zeros(100), 100, 2.0, 1 << 30, BLOCK=64),
    ),
    "write behind": (
        r"out-of-bounds store in 28 lanes, first at byte 400 of Y, which has 400 \(scale_out_of_bounds at \(1, 0, 0\)",
        lambda: kernels.scale_out_of_bounds[(2,)](zeros(100), zeros(100), 100, 2.0, BLOCK=64),
    ),
    "atomic behind": (
        r"out-of-bounds atomic",
        lambda: kernels.add_up[(1,)](zeros(64), zeros(7), 64, 8, BLOCK=64),
    ),
    "empty tensor": (
        r"out-of-bounds load in 64 lanes, first at byte 0 of X, which has 0",
        lambda: kernels.scale[(1,)](zeros(0), zeros(64), 64, 2.0, 0, BLOCK=64),
    ),
    "two programs store": (
        r"race: a store here and stores of program number 0 touch one element \(overlapping_blocks at \(1, 0, 0\)",
        lambda: kernels.overlapping_blocks[(4,)](zeros(64), zeros(64), 8, BLOCK=16),
    ),
    "lanes store different values": (
        r"lanes of one store write different values to one element \(duplicates at",
        lambda: kernels.duplicates[(1,)](torch.zeros(8, dtype=torch.int32), 8, BLOCK=64),
    ),
    "load of what another program stores": (
        r"race: a load here and stores of program number 0",
        lambda: kernels.reads_neighbour[(4,)](torch.zeros(64, dtype=torch.int32), BLOCK=16),
    ),
    "store to what another program has loaded": (
        r"race: a store here and loads of program number 0",
        lambda: kernels.overlapping_blocks[(2,)](*(lambda x: (x[16:], x))(zeros(64)), 16, BLOCK=16),
    ),
    "plain load of an atomic counter": (
        r"race: (a load here and atomics|a atomic here and loads) of program number 0",
        lambda: kernels.plain_counter[(2,)](torch.zeros(3, dtype=torch.int32)),
    ),
    "relaxed counter orders nothing": (
        r"race: a load here and stores of program number 0 touch one element \(last_sums",
        lambda: kernels.last_sums[(4,)](
            zeros(64), zeros(4), torch.zeros(1, dtype=torch.int32), zeros(1), 4, SEM="relaxed", BLOCK=16
        ),
    ),
    "no barrier": (
        r"a load of what other lanes stored, without tl\.debug_barrier\(\) between them \(turned",
        lambda: kernels.turned[(1,)](zeros(64), zeros(64), BARRIER=False, BLOCK=64),
    ),
    "int32 overflow": (
        r"int32 overflow detected for operation mul",
        lambda: kernels.offsets_in_int32[(1,)](zeros(64), zeros(64), 1 << 30, BLOCK=64),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    message, run = FAULTS[fault]
    with pytest.raises(InterpreterError, match=message):
        run()


def test_after_a_fault_right_kernels_pass() -> None:
    with pytest.raises(InterpreterError):
        kernels.scale[(2,)](zeros(100), zeros(100), 100, 2.0, 1, BLOCK=64)
    test_right_kernels_pass()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_load_without_other_is_nan(dtype: torch.dtype) -> None:
    y = zeros(1)
    kernels.sum_without_other[(1,)](torch.ones(64, dtype=dtype), y, 64, BLOCK=64)
    assert y.item() == 64
    kernels.sum_without_other[(1,)](torch.ones(64, dtype=dtype), y, 60, BLOCK=64)
    assert y.isnan().all()


def test_masked_load_without_other_is_a_huge_integer() -> None:
    y = torch.zeros(1, dtype=torch.int64)
    kernels.sum_without_other[(1,)](torch.ones(64, dtype=torch.int32), y, 63, BLOCK=64)
    assert y.item() > 1 << 29


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, float("nan")), (torch.bfloat16, float("nan")), (torch.int32, 2**31 - 1)]
)
def test_what_a_kernel_does_not_write_is_poison(dtype: torch.dtype, expected: float) -> None:
    for new in (torch.empty(64, dtype=dtype), torch.empty_like(torch.zeros(64, dtype=dtype))):
        kernels.write_less[(1,)](new, 64, BLOCK=64)
        assert new[62].item() == 62
        assert new[63].item() == expected or (expected != expected and new[63].isnan())


def test_offsets_beyond_int32_without_the_memory() -> None:
    with untouched_memory():
        x = torch.empty(1 << 32, dtype=torch.int8).as_strided((64,), (1 << 26,))
    x.fill_(7)
    y = torch.empty(64, dtype=torch.int8)
    kernels.offsets_in_int64[(1,)](x, y, 1 << 26, BLOCK=64)
    assert (y == 7).all()


def test_a_counter_orders_programs() -> None:
    x, out = torch.ones(64), torch.empty(1)
    counter = torch.zeros(1, dtype=torch.int32)
    kernels.last_sums[(4,)](x, torch.empty(4), counter, out, 4, SEM="acq_rel", BLOCK=16)
    assert out.item() == 64


def test_a_lock_orders_programs() -> None:
    total = zeros(1)
    kernels.locked_sum[(4,)](torch.ones(64), torch.zeros(1, dtype=torch.int32), total, BLOCK=16)
    assert total.item() == 64


def test_a_barrier_orders_lanes() -> None:
    x = torch.arange(64.0)
    kernels.turned[(1,)](x, torch.empty(64), BARRIER=True, BLOCK=64)
    assert torch.equal(x, torch.arange(63.0, -1, -1))


def test_the_language_is_as_before() -> None:
    tl = triton_runtime.tl
    before = tl.load, tl.core.load, tl.tensor.__add__, tl.range
    y = torch.empty(1)
    kernels.nested[(1,)](torch.ones(4), y, BLOCK=4)
    assert y.item() == pytest.approx(1 / (1 + 2.718281828**-4))
    assert before == (tl.load, tl.core.load, tl.tensor.__add__, tl.range)


@pytest.mark.slow
def test_compiled_functions_work_beside_it() -> None:
    kernels.nested[(1,)](torch.ones(4), torch.empty(1), BLOCK=4)
    compiled = torch.compile(lambda x: (x * 2).sum(), fullgraph=True)
    assert compiled(torch.ones(5)).item() == 10
