"""Builds the C++ tests with the address and undefined-behaviour sanitizers and runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++") or not shutil.which("cmake"), reason="no C++ compiler or no cmake")
def test_csrc_under_sanitizers(tmp_path: Path) -> None:
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DMEGASEQ_PYTHON=OFF", "-DMEGASEQ_TESTS=ON"]
    configure += [f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (configure, ["cmake", "--build", str(tmp_path)], [str(tmp_path / "csrc_test")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
