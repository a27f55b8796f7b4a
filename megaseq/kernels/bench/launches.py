"""Launches of Triton kernels as the benchmarks see them: which there were, and all of them compiled at once."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megaseq.kernels.triton_runtime import interpreted, triton

logger = logging.getLogger(__name__)

MOST_WORKERS = 16
"""Kernels that are compiled at one time; each keeps a core busy."""
ALIGNMENT = 16
"""Bytes, and numbers, whose multiples Triton compiles a kernel of their own for."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a kernel was called with, without the memory of its tensors."""

    kernel: Any
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    def compile(self) -> None:
        """Compiles the kernel for these arguments, or finds it compiled."""
        self.kernel.run(*self.arguments, grid=(1,), warmup=True, **self.named)

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for launches that one compiled kernel serves."""
        numbers = {parameter.name for parameter in self.kernel.params if not parameter.is_constexpr}
        names = [parameter.name for parameter in self.kernel.params]
        # What is no parameter is an option of the launch, such as the number of warps.
        pairs = [*zip(names, self.arguments, strict=False), *sorted(self.named.items())]
        return (id(self.kernel), *((name, _class(value) if name in numbers else value) for name, value in pairs))


class Standin:
    """A tensor's type and alignment: all that compiling takes of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        # At nothing's address, so that all of an alignment look the same.
        self._place = tensor.data_ptr() % ALIGNMENT + ALIGNMENT
        self._bytes = tensor.untyped_storage().size()

    def data_ptr(self) -> int:
        """Some address of the tensor's alignment."""
        return self._place

    def ptr_range(self) -> int:
        """Bytes of its memory."""
        return self._bytes


@contextlib.contextmanager
def launched() -> Iterator[set[str]]:
    """While it is open, the set that it gives collects the names of the kernels that are launched."""
    found: set[str] = set()

    def note(stock: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(kernel, *args, **kwargs)
        found.add(kernel.fn.__name__)
        return result

    with _instead_of_launches(note):
        yield found


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """While it is open, nothing is launched; the list that it gives collects what would have been.

    What kernels write stays as it was in memory: do not look at it.
    """
    found: list[Launch] = []

    def note(stock: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> None:
        named = {name: _light(value) for name, value in kwargs.items() if name not in ("grid", "warmup")}
        found.append(Launch(kernel, tuple(map(_light, args)), named))

    with _instead_of_launches(note):
        yield found


def compile_all(launches: Iterable[Launch], *, workers: int | None = None) -> int:
    """Compiles what the launches need, many at a time; returns how many kernels that are.

    A kernel that does not compile is passed over: its launch will say why.
    """
    different = {launch.kind: launch for launch in launches}
    with ThreadPoolExecutor(workers or min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        done = list(pool.map(_compiles, different.values()))
    return sum(done)


def _compiles(launch: Launch) -> bool:
    try:
        launch.compile()
    except Exception as error:  # The compiler raises of all kinds.
        logger.debug("%s does not compile: %s: %s", launch.kernel.fn.__name__, type(error).__name__, error)
        return False
    return True


@contextlib.contextmanager
def _instead_of_launches(function: Callable[..., Any]) -> Iterator[None]:
    """While it is open, a launch calls `function` with what would launch, the kernel and the launch's arguments.

    Of all threads: torch runs backward passes in one of its own.
    """
    kinds = [triton.runtime.JITFunction]
    if interpreted():
        kinds.append(importlib.import_module("triton.runtime.interpreter").InterpretedFunction)
    stocks = [kind.run for kind in kinds]

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kernel, *args, **kwargs: function(stock, kernel, *args, **kwargs)

    for kind, stock in zip(kinds, stocks, strict=True):
        kind.run = make(stock)
    try:
        yield
    finally:
        for kind, stock in zip(kinds, stocks, strict=True):
            kind.run = stock


def _light(value: Any) -> Any:
    return Standin(value) if isinstance(value, torch.Tensor) else value


def _class(value: Any) -> object:
    """What Triton compiles a kernel of its own for."""
    if isinstance(value, Standin):
        return value.dtype, value.data_ptr()
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value) if isinstance(value, float) else value
    return "int", value == 1, value % ALIGNMENT == 0, -(2**31) <= value < 2**31
