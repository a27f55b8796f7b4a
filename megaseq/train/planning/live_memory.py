"""Counts the bytes of all tensors that are alive, operation by operation: exact, on any device, fake ones too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, `current` is the sum of the storages that live and `peak` its highest value.

    Storages that exist before are counted from when an operation reads them or `track` names them; a storage counts
    once, however many tensors view it. What an operation allocates and frees inside itself is not seen. The backward
    pass is seen where autograd runs it in the thread that calls it, which is so on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that exist already."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> int:
        """Begins a new peak at what lives now, which is returned."""
        self.peak = self.current
        return self.current

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if size == 0:
            return
        seen = self._known.get(storage)
        if seen is not None:
            # DeepSpeed's stage 3 lets the storage of a gathered parameter shrink to nothing and grow again.
            self.current += size - self._sizes[seen]
            self._sizes[seen] = size
        else:
            key, self._next = self._next, self._next + 1
            self._known[storage] = key
            self._sizes[key] = size
            self.current += size
            weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out
