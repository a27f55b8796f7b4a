"""What `megaseq bench kernels` proves and times: an op lists it in its `bench.py`, as `bench_cases()`.

What is only proven, on a GPU, is in `proofs.py`, as `proof_cases()`: the calls of `cases.py`, which tests prove too.
The list costs nothing to make: memory is taken, and the op is called, only by `check` and `prepare`, on their device.
A wrong result is never timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megaseq.kernels.triton_runtime import Config


def proof_dtype(dtype: torch.dtype, *, device: torch.device) -> torch.dtype:
    """The type in which a case is proven: on the host float32, as Triton's interpreter cannot compute with bf16."""
    return dtype if device.type == "cuda" else torch.float32


def ready(call: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    """A peer that takes no tensors of its own: what `Timed.peers` holds for it."""
    return lambda: call


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A result of the op beside that of its reference."""

    found: Tensor
    """What the op gave, of any shape."""
    expected: Tensor
    """What the reference gave, of the same shape; float64 where that is the better judge."""
    tolerance: float
    """Largest allowed difference, in units of the largest magnitude of `expected`, or 0.001 if that is smaller."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """The calls to be timed, with tensors of full size in the device's memory."""

    run: Callable[[], object]
    """The op. Called many times; must not wait for the device."""
    peers: Mapping[str, Callable[[], Callable[[], object]]] = dataclasses.field(default_factory=dict)
    """What else computes the same, by name, such as "flex_attention": makes the call to be timed when its turn comes,
    so that only its own tensors are in memory. One that cannot be made or run is reported, not fatal."""
    flops: float = 0.0
    """Floating-point operations of one run that nobody can avoid, 0 where memory is what counts."""
    bytes: float = 0.0
    """Bytes that one run must read and write at least."""
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By peer: how many times as long it should take as the op; by "PEER:memory": how many times as much memory; by
    "ceiling": the share of it to reach."""


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One shape of one op."""

    op: str
    """Name of the op: that of its folder."""
    name: str
    """Name of the shape, such as "t5_large_512_128_packed"; unique among the cases of the op."""
    check: Callable[[torch.device], Mapping[str, Comparison]]
    """Runs the op and its reference on small tensors of the same kind: each output and gradient by name."""
    prepare: Callable[[torch.device], Timed] | None = None
    """Makes the tensors of full size; on the host small ones, with which tests run what would be timed. None: the case
    is only proven."""
    candidates: Mapping[str, Sequence[Config]] = dataclasses.field(default_factory=dict)
    """By kernel: the tile sizes that the tuner tries for this shape."""
