"""Launches: noted while they run, noted instead of running, and compiled together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megaseq.kernels.bench.launches import Launch, Standin, compile_all, launched, recorded
from megaseq.kernels.rotary import rotate

ROOT = Path(__file__).parents[3]


def turn(x: torch.Tensor) -> torch.Tensor:
    angles = torch.ones(1, 5, 1, 16, device=x.device)
    return rotate(x, cosines=angles, sines=angles)


@pytest.fixture
def x(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setenv("MEGASEQ_KERNELS", "rotary=triton")
    return torch.ones(2, 5, 3, 16, device=device)


def test_kernels_that_are_launched_are_noted(x: torch.Tensor) -> None:
    with launched() as names:
        found = turn(x)
    assert names == {"rotate_kernel"} and not torch.equal(found, x)
    turn(x)
    assert len(names) == 1


def test_launches_in_other_threads_are_noted(x: torch.Tensor) -> None:
    """As the backward passes of CUDA tensors are."""
    with launched() as names:
        thread = threading.Thread(target=turn, args=(x,))
        thread.start()
        thread.join()
    assert names == {"rotate_kernel"}


def test_nothing_is_launched_while_launches_are_recorded(x: torch.Tensor) -> None:
    with launched() as names, recorded() as found:
        turn(x)
    assert not names and len(found) == 1
    assert all(not isinstance(value, torch.Tensor) for value in (*found[0].arguments, *found[0].named.values()))


class Kernel:
    """What `Launch` knows of a kernel, which cannot compile tiles of 13."""

    def __init__(self) -> None:
        names = (("pointer", False), ("count", False), ("BLOCK", True))
        self.params = [SimpleNamespace(name=name, is_constexpr=constant) for name, constant in names]
        self.fn = SimpleNamespace(__name__="kernel")
        self.compiled: list[int] = []

    def run(self, pointer: Any, count: int, *, grid: Any, warmup: bool, BLOCK: int, num_warps: int = 4) -> None:
        assert warmup and isinstance(pointer, Standin)
        if BLOCK == 13:
            raise RuntimeError("no power of two")
        self.compiled.append(BLOCK * num_warps)


def test_one_kernel_for_launches_of_one_kind() -> None:
    kernel, memory = Kernel(), torch.empty(64)

    def launch(tensor: torch.Tensor, count: int, **named: int) -> Launch:
        return Launch(kernel, (Standin(tensor), count), named)

    same = [launch(memory, count, BLOCK=16) for count in (32, 160, 1024)]
    other = [
        launch(memory, 1, BLOCK=16),
        launch(memory, 33, BLOCK=16),
        launch(memory[1:], 32, BLOCK=16),
        launch(memory.half(), 32, BLOCK=16),
        launch(memory, 32, BLOCK=32),
        launch(memory, 32, BLOCK=16, num_warps=8),
        launch(memory, 2**40, BLOCK=16),
    ]
    assert len({one.kind for one in same}) == 1
    assert len({one.kind for one in (*same, *other)}) == 1 + len(other)
    assert compile_all([*same, *other, launch(memory, 32, BLOCK=13)], workers=3) == 8
    assert sorted(kernel.compiled) == [64] * 6 + [128] * 2


COMPILES = """
import torch
from tests.kernels.ahead_of_time.driver import CompilingDriver, compiling
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from megaseq.kernels.bench.launches import compile_all, recorded
from megaseq.kernels.rotary.cases import compile_cases

cases = compile_cases()[:2]
driver.set_active(CompilingDriver(90))
with recorded() as found:
    for case in cases:
        case.run()
assert compile_all(found, workers=2) == len({launch.kind for launch in found}) > 2
again, stock = [], JITFunction._do_compile
JITFunction._do_compile = lambda kernel, *rest: again.append(kernel) or stock(kernel, *rest)
with compiling(90) as launches:
    driver.set_active(CompilingDriver(90))
    for case in cases:
        case.run()
assert len(launches) == len(found) and all(launch.compiled for launch in launches)
assert not again, again
"""


@pytest.mark.slow
def test_launches_find_what_was_compiled_for_them(tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
