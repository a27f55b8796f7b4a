"""What is compiled ahead of time to prove that the kernels of an op compile and fit on a GPU that is not at hand.

An op lists its cases in `cases.py`, as `compile_cases()`. The tests run them once for each architecture under a driver
for which a launch only compiles; tests/kernels/ahead_of_time/ has the harness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """Some launches of an op's kernels."""

    name: str
    """What they are, such as "bf16_causal_bias"; unique among the cases of the op."""
    run: Callable[[], object]
    """Calls the op's launchers with small tensors in host memory. Nothing is computed: do not look at outputs."""
    tensor_cores: tuple[str, ...] = ()
    """Names of kernels whose matrix products must run on tensor cores: by wgmma on sm_90, by tcgen05 on sm_100."""
    tensor_cores_unknown_on: tuple[int, ...] = ()
    """Architectures where the installed Triton does not know these instructions."""
    spill_bytes: int = 0
    """Bytes of registers that a kernel of the case may store to memory for want of room, for each thread."""
    minimum_architecture: int = 80
    """Older ones are left out: e4m3 needs sm_89."""
