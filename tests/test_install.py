"""Installing from a fresh tree: with a compiler the extension is built, without one it succeeds and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("nanobind", reason="the build requirements are not installed")
pytest.importorskip("setuptools", reason="the build requirements are not installed")

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import sys
# An editable installation in the tests' environment would give its own extension to the package under test.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import numpy as np
from megaseq.base import native
from megaseq.data.packing import pack_rows
rows = pack_rows(source_lengths=np.array([3, 2, 1]), target_lengths=np.array([4, 1, 5]), source_row=5, target_row=5)
print(native.available(), rows.examples.tolist(), rows.offsets.tolist())
print(native.describe())
"""


def test_a_gpu_machine_keeps_its_torch(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", "source launch/_install.sh; _gpu_constraints"],
        cwd=ROOT,
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)}
    assert len(pins) == len(lines) > 50 and "triton" not in pins
    assert pins["torch"] == metadata.version("torch")
    # Else pip looks for another torch, which suits the other versions.
    for wanted in map(Requirement, metadata.requires("torch") or []):
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        pin = pins.get(canonicalize_name(wanted.name)) if applies else None
        assert pin is None or wanted.specifier.contains(pin), wanted


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a fresh clone has and a build reads: no extension, no build folder."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md", "constraints.txt"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "megaseq", copy / "megaseq", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def install(tree: Path, **environment: str) -> tuple[Path, str]:
    """Builds a wheel with the packages at hand and unpacks it; returns where, and all that was printed."""
    wheels, site = tree.parent / "wheels", tree.parent / "site"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    done = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = wheels.glob("megaseq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site, done.stdout


def probe(site: Path) -> str:
    """Runs megaseq from `site` in a new interpreter and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGASEQ_NATIVE"}
    environment["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=site, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_says_so(tree: Path) -> None:
    site, printed = install(tree, CXX="/nowhere/c++", MEGASEQ_REQUIRE_NATIVE="0")
    assert "megaseq: the C++ extension could not be built" in printed
    # pip indents what a build prints, so a sentence is found by one of its lines.
    assert "same search, with attention equal but for rounding" in printed
    assert not list(site.rglob("_csrc*.so"))
    result = probe(site)
    assert result.startswith("False [0, 1, 2] [0, 2, 3]")
    assert "the NumPy fallback is used. Install a C++20 compiler" in result


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_with_a_compiler_the_extension_is_built(tree: Path) -> None:
    site, _ = install(tree, MEGASEQ_REQUIRE_NATIVE="1")
    assert probe(site).startswith("True [0, 1, 2] [0, 2, 3]")
    packages = {path.parent.relative_to(tree) for path in (tree / "megaseq").rglob("*.py")}
    assert packages == {path.parent.relative_to(site) for path in (site / "megaseq").rglob("*.py")}
    (info,) = site.glob("megaseq-*.dist-info")
    assert "megaseq = megaseq.cli.main:main" in (info / "entry_points.txt").read_text()
    assert (site / "megaseq" / "py.typed").exists()


@pytest.mark.slow
def test_a_failed_build_is_an_error_where_it_is_required(tree: Path) -> None:
    with pytest.raises(AssertionError, match="cmake"):
        install(tree, CXX="/nowhere/c++", MEGASEQ_REQUIRE_NATIVE="1")
