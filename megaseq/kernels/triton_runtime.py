"""The one door to Triton: its modules, whether its kernels can run here, and the tile sizes that they run with.

Files with kernels start with `from megaseq.kernels.triton_runtime import tl, triton`, which fails where Triton is not
installed; so they are imported by the op only once `unable` has said that Triton can run the call.

Under TRITON_INTERPRET=1, which Triton reads when a kernel is defined, kernels run on the host, slowly: for tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaseq.base import optional

if TYPE_CHECKING:
    triton: Any
    tl: Any

TABLES = Path(__file__).parent / "tuned"
"""Tile sizes by kernel, one file for each architecture: `sm_90.json`. Written by `megaseq bench kernels --tune`."""


def __getattr__(name: str) -> Any:
    if name == "triton":
        return optional("triton", needed_for="Triton kernels")
    if name == "tl":
        optional("triton", needed_for="Triton kernels")
        return importlib.import_module("triton.language")
    raise AttributeError(f"module {__name__} has no attribute {name}")


# Looked for once, here: torch.compile traces through a cached function, and torch 2.11 refuses `find_spec` in it.
_INSTALLED = importlib.util.find_spec("triton") is not None


def installed() -> bool:
    """Whether Triton can be imported."""
    return _INSTALLED


def interpreted() -> bool:
    """Whether kernels defined now run on the host."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unable(tensor: Tensor) -> str | None:
    """Why Triton's kernels cannot run on `tensor`, as the end of "..., and"; None where they can."""
    if not installed():
        return "Triton is not installed"
    if interpreted():
        return None if tensor.device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels in host memory alone"
    if tensor.device.type != "cuda":
        return f"its kernels run on a GPU, not on {tensor.device.type} (TRITON_INTERPRET=1 runs them slowly)"
    return None


def architecture() -> int:
    """Compute capability that kernels are compiled for, as in sm_90; 0 for the interpreter."""
    if interpreted():
        return 0
    return int(_module("triton.runtime.driver").driver.active.get_current_target().arch)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched. Lists of them are what a tuner tries and what is compiled ahead of time in tests."""

    blocks: Mapping[str, int]
    """Tile sizes by the names of the kernel's constexpr arguments, such as BLOCK_M."""
    num_warps: int = 4
    """Warps of a program."""
    num_stages: int = 2
    """Depth of the software pipeline."""

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of the launch; the interpreter takes no launch options."""
        options = {} if interpreted() else {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**self.blocks, **options}


def kind_of(dtype: torch.dtype) -> str:
    """What keys of the tables call a type: both of 16 bits are "half", as tiles and speed are the same."""
    return "half" if dtype in (torch.bfloat16, torch.float16) else str(dtype).removeprefix("torch.")


_overrides: dict[str, Config] = {}


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Launches the kernels of these names with other tile sizes while it is open: for tests and the tuner."""
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


_observers: list[set[tuple[str, str]]] = []


@contextlib.contextmanager
def observed() -> Iterator[set[tuple[str, str]]]:
    """While it is open, the set that it gives collects (kernel, key) of every `config` that is asked for."""
    found: set[tuple[str, str]] = set()
    _observers.append(found)
    try:
        yield found
    finally:
        # By identity: two sets may be equal.
        _observers[:] = [observer for observer in _observers if observer is not found]


def config(kernel: str, *, key: str, default: Config) -> Config:
    """The tile sizes that a kernel runs with.

    Args:
        kernel: its name, such as "attention_forward".
        key: what the best sizes depend on, such as "bfloat16,head=64,bias"; keys of the tables.
        default: for what no table knows.
    """
    for observer in _observers:
        observer.add((kernel, key))
    if kernel in _overrides:
        return _overrides[kernel]
    if key in _learned.get(kernel, {}):
        return _learned[kernel][key]
    return _table(architecture()).get(kernel, {}).get(key, default)


_learned: dict[str, dict[str, Config]] = {}


def learn(kernel: str, *, rows: Mapping[str, Config]) -> None:
    """From now on launches of this process take these tile sizes, by key, whatever the tables say."""
    _learned.setdefault(kernel, {}).update(rows)


@functools.cache
def _table(arch: int) -> Mapping[str, Mapping[str, Config]]:
    path = TABLES / f"sm_{arch}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        kernel: {key: Config(entry["blocks"], entry["num_warps"], entry["num_stages"]) for key, entry in rows.items()}
        for kernel, rows in content["kernels"].items()
    }


def forget_tables() -> None:
    """Tables are read anew, and what was learnt is gone: after one was written."""
    _table.cache_clear()
    _learned.clear()


def _module(name: str) -> Any:
    optional("triton", needed_for="Triton kernels")
    return importlib.import_module(name)
