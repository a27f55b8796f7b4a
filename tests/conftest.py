"""What holds for all tests: none leaves the process in another state than it found it in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read when a kernel is defined: where there is no GPU, tests run Triton's kernels on the host.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Says once that one process is meant; pytest resets the filter that the package sets when it is imported."""
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Takes back what the jobs set for their whole process: flushing of denormals, threads of matrix products."""
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
