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
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megaseq.base import optional

if TYPE_CHECKING:
    triton: Any
    tl: Any

P = ParamSpec("P")
R = TypeVar("R")

TABLES = Path(__file__).parent / "tuned"
"""Tile sizes by kernel, one file for each architecture: `sm_90.json`. Written by `megaseq bench kernels --tune`."""


# The dictionary behind os.environ: a look-up takes a tenth of the time of one through os.environ.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_INTERPRET: Any = os.environ.encodekey("TRITON_INTERPRET") if hasattr(os.environ, "_data") else "TRITON_INTERPRET"


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


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of Triton, whose compilers differ in what they keep in registers."""
    major, minor = optional("triton", needed_for="Triton kernels").__version__.split(".")[:2]
    return int(major), int(minor)


def interpreted() -> bool:
    """Whether kernels defined now run on the host."""
    return _ENVIRONMENT.get(_INTERPRET) in ("1", b"1")


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
    active = _driver().active
    return _capability(active, active.get_current_device())


def generation(arch: int) -> int:
    """Which tensor cores an architecture has: 80 multiplies out of registers, 90 (wgmma) out of shared memory, 100
    (tcgen05) into a memory of its own. Consumer cards stayed with the first, up to sm_120."""
    if 100 <= arch < 120:
        return 100
    return 90 if arch == 90 else min(arch, 80)


def shared_memory() -> int:
    """Bytes of shared memory that a block may have on the current GPU; without end for the interpreter."""
    if interpreted():
        return 1 << 62
    active = _driver().active
    return _shared_memory(active, active.get_current_device())


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Makes the device of a launcher's first argument the current one while it runs, as Triton launches there.

    Every function that launches a kernel is wrapped in this. What it asks of the GPU, such as `architecture`, is then
    also asked of the right one.

    Args:
        launcher: its first argument has a `device`.
    """
    first = next(iter(inspect.signature(launcher).parameters))

    @functools.wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        placed: Any = args[0] if args else kwargs[first]
        device: torch.device = placed.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched. Lists of them are what a tuner tries and what is compiled ahead of time in tests."""

    blocks: Mapping[str, int]
    """Tile sizes by the names of the kernel's constexpr arguments, such as BLOCK_M."""
    num_warps: int = 4
    """Warps of a program."""
    num_stages: int = 2
    """Depth of the software pipeline."""

    def arguments(self, *, fused: bool = True) -> dict[str, int]:
        """The keyword arguments of the launch; the interpreter takes no launch options.

        Args:
            fused: whether the compiler may round a product and the sum that it goes into once. It is always said, as
                versions of Triton differ in what they do where nothing is.
        """
        if interpreted():
            return dict(self.blocks)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": fused}
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


@functools.cache
def _driver() -> Any:
    """Triton's way to the GPU; its `active` may be exchanged."""
    optional("triton", needed_for="Triton kernels")
    return importlib.import_module("triton.runtime.driver").driver


@functools.cache
def _capability(active: Any, device: int) -> int:
    """Of a device; Triton, asked for the target, asks torch for much more."""
    del device  # The current one.
    return int(active.get_current_target().arch)


@functools.cache
def _shared_memory(active: Any, device: int) -> int:
    return int(active.utils.get_device_properties(device)["max_shared_mem"])
