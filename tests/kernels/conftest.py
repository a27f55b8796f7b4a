"""What tests of kernels share: the device, and an interpreter whose arithmetic and memory are watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megaseq.kernels import triton_runtime
from tests.kernels.interpreter import needs_kernels
from tests.kernels.interpreter.poison import poisoned_memory


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where Triton's kernels run: on the GPU, or else on the host under the watched interpreter.

    New memory is poisoned while the test runs.
    """
    needs_kernels()
    with poisoned_memory():
        yield torch.device("cuda" if torch.cuda.is_available() and not triton_runtime.interpreted() else "cpu")
