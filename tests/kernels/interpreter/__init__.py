"""Triton's interpreter, watched: what a test that runs kernels on the host asks for."""

from __future__ import annotations

import pytest

from megaseq.kernels import triton_runtime


def needs_kernels() -> None:
    """Skips the test without Triton; without a GPU, watches the interpreter and mends what is wrong in it."""
    if not triton_runtime.installed():
        pytest.skip("Triton is not installed")
    if triton_runtime.interpreted():
        from tests.kernels.interpreter.install import install

        install()
