"""A Triton driver without a device: launches of kernels compile them for an architecture, and do nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels.ahead_of_time.figures import SHARED_LIMIT

SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "uint8": "u8", "bool": "i1"}
FUSED = ("enable_fp_fusion", True)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, what it was specialised for, and what the compiler made or said."""

    kernel: str
    types: str
    constants: str
    compiled: Any
    """Triton's CompiledKernel; None where it failed."""
    error: str = ""


class CompilingDriver:
    """What Triton asks of a driver on the way to a compiled kernel."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.target.arch]}

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def describe(fn: JITFunction, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """(types of the tensors, constants with launch options) of a launch, for people."""
    names = set(fn.signature.parameters)
    bound = fn.signature.bind_partial(*args, **{name: value for name, value in kwargs.items() if name in names})
    dtypes = [str(value.dtype).removeprefix("torch.") for value in bound.arguments.values() if hasattr(value, "dtype")]
    short = [SHORT.get(name, name.replace("float", "f").replace("int", "i")) for name in dict.fromkeys(dtypes)]
    constants = {p.name: bound.arguments.get(p.name, p.default) for p in fn.params if p.is_constexpr}
    # That products are fused is the rule.
    options = {name: value for name, value in kwargs.items() if name not in names and (name, value) != FUSED}
    words = [name if value is True else f"{name}={value}" for name, value in constants.items() if value is not False]
    words += [f"{name.removeprefix('num_')}={value}" for name, value in options.items()]
    return ",".join(short), " ".join(words)


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list[Launch]]:
    """While it is open, launches compile for `architecture`; the list that it gives collects them.

    A process should compile for one architecture alone: Triton 3.6 mixes them up.
    """
    launches: list[Launch] = []
    stock = JITFunction.run

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        types, constants = describe(fn, *args, **kwargs)
        try:
            compiled, error = stock(fn, *args, grid=grid, warmup=True, **kwargs), ""
        except Exception as problem:  # The compiler raises of all kinds; each is a finding, and the next is wanted too.
            compiled, error = None, f"{type(problem).__name__}: {problem}"
        launches.append(Launch(fn.__name__, types, constants, compiled, error))
        return compiled

    before = driver._active
    driver.set_active(CompilingDriver(architecture))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = stock
        driver._active = before
