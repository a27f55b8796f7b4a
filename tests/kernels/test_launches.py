"""What every launch of a kernel owes: the right device, and options that do not change with Triton's version."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.catalogue import FOLDER, kernel_names, ops_with_kernels
from megaseq.kernels.triton_runtime import on_its_device


def launches() -> Iterator[tuple[str, ast.FunctionDef, ast.Call]]:
    """(where, function, launch) of all kernels of all ops."""
    for op in ops_with_kernels():
        names = set(kernel_names(op))
        for path in sorted((FOLDER / op).rglob("*.py")):
            for function in ast.parse(path.read_text(encoding="utf-8")).body:
                if not isinstance(function, ast.FunctionDef):
                    continue
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                        kernel = ast.unparse(node.func.value).rpartition(".")[2]
                        if kernel in names:
                            yield f"{path.relative_to(FOLDER)}: {kernel}", function, node


def test_all_launches_are_found() -> None:
    found = {where.rpartition(" ")[2] for where, _, _ in launches()}
    assert found == {name for op in ops_with_kernels() for name in kernel_names(op)}


def test_every_launcher_makes_its_device_the_current_one() -> None:
    for where, function, _ in launches():
        decorators = [ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list]
        assert "on_its_device" in decorators, where


def test_every_launch_takes_its_options_from_a_config() -> None:
    """`Config.arguments` says all of them; see `test_a_launch_says_whether_products_are_fused`."""
    for where, _, launch in launches():
        assert any(keyword.arg is None for keyword in launch.keywords), where


def test_a_launch_says_whether_products_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = triton_runtime.Config({"BLOCK": 16})
    assert config.arguments()["enable_fp_fusion"] is True
    assert config.arguments(fused=False)["enable_fp_fusion"] is False


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Devices that became the current one, in a process whose current one is the first."""
    found: list[int] = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        found.append(device.index)
        yield
        found.append(-1)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    return found


@on_its_device
def launcher(x: Any, *, log: list[Any]) -> str:
    """A launcher that writes down that it ran."""
    log.append(x)
    return "done"


def test_a_launch_on_another_device_happens_there(entered: list[int]) -> None:
    there = SimpleNamespace(device=torch.device("cuda", 1))
    assert launcher(there, log=entered) == "done"
    assert launcher(x=there, log=entered) == "done"
    assert entered == [1, there, -1] * 2


@pytest.mark.parametrize("device", [torch.device("cuda", 0), torch.device("cpu")])
def test_a_launch_on_the_current_device_changes_nothing(device: torch.device, entered: list[int]) -> None:
    here = SimpleNamespace(device=device)
    assert launcher(here, log=entered) == "done" and entered == [here]


class _Recorder:
    """Stands for a kernel."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


@pytest.mark.skipif(not triton_runtime.installed(), reason="Triton is not installed")
def test_grids_of_very_wide_rows_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than the second dimension of a grid may count."""
    from megaseq.kernels.quantize import op, triton_kernels

    recorder = _Recorder()
    monkeypatch.setattr(triton_kernels, "quantize_kernel", recorder)
    monkeypatch.setattr(triton_kernels, "dequantize_kernel", recorder)
    x = torch.zeros(1, 1).expand(2, 1 << 28)
    scales = torch.zeros(1, 1).expand(2, 1 << 22)
    op.launch_quantize(x, out=x, scales=None, form="int8", block=64, power_of_two=False)
    op.launch_dequantize(x, scales=scales, block=64, out=x)
    assert len(recorder.grids) == 2
    for grid in recorder.grids:
        assert 65_535 < grid[0] < 1 << 31 and all(size <= 65_535 for size in grid[1:])
