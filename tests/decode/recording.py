"""What a CUDA graph does, in host memory: the ops of a function are recorded, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "is_nonzero", "lift_fresh")
"""Ops by which the host reads from a device, or gives it what it has made itself."""


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Runs ops and writes them down; `undo` gives the memory that they have changed its values back."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and writes down."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{func} cannot be recorded")
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *self._named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_iter(value):
                    storage = tensor.untyped_storage()
                    self._before.setdefault(_storage(tensor), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, result))
        return result

    @staticmethod
    def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]

    def undo(self) -> None:
        """Takes back what was done."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        """Does the ops again; what one makes lies where it lay when it was recorded."""
        for func, args, kwargs, result in self.ops:
            own = {_storage(value) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                if isinstance(old, torch.Tensor) and _storage(old) not in own:
                    old.copy_(new)


class Captures:
    """Records as `capture_cuda_graph` does, and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        """Records `body`, which changes no memory."""
        recorder = Recorder()
        with recorder:
            body()
        recorder.undo()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return replay
