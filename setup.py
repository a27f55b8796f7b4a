"""Builds the C++ extension through CMake; everything else about the package stands in pyproject.toml.

The extension is optional. Where there is no C++ compiler the install succeeds, says so, and megaseq uses NumPy.
`MEGASEQ_REQUIRE_NATIVE=1` makes a failed build an error instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds the one extension with CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds in the temporary directory, and copies the module to where setuptools wants it."""
        build_dir = Path(self.build_temp).resolve() / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            build_dir.mkdir(parents=True, exist_ok=True)
            run_cmake("-S", str(ROOT), "-B", str(build_dir), *generator(), *options())
            run_cmake("--build", str(build_dir), "--target", "_csrc", "--parallel")
            built = build_dir / target.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("MEGASEQ_REQUIRE_NATIVE") == "1":
                raise
            # A module from an earlier build would not fit these sources.
            target.unlink(missing_ok=True)
            say_fallback(error)


def run_cmake(*arguments: str) -> None:
    """Runs CMake: the one of the build requirements where it can be imported, else the one on the PATH."""
    try:
        import cmake

        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        program = "cmake"
    subprocess.run([program, *arguments], check=True)


def generator() -> list[str]:
    """Ninja where it is there, as it brings its own way to build; CMake's default (make) elsewhere."""
    return ["-G", "Ninja"] if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ else []


def options() -> list[str]:
    """The interpreter that installs, and the nanobind that it sees."""
    found = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    try:
        import nanobind
    except ImportError:
        return found
    return [*found, f"-Dnanobind_DIR={nanobind.cmake_dir()}"]


def say_fallback(error: Exception) -> None:
    """Says, so that it stands out in pip's output, that the package works but without C++."""
    rule = "*" * 100
    print(
        f"\n{rule}\nmegaseq: the C++ extension could not be built ({error}).\n"
        "megaseq is installed all the same and uses the fallbacks in Python, NumPy and torch: the same data and the\n"
        "same search, with attention equal but for rounding.\n"
        f"For the faster one: install a C++20 compiler, then install megaseq again.\n{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def sources(pattern: str) -> list[str]:
    """Returns the files of csrc/ that match, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "megaseq" / "csrc").glob(pattern))


setup(
    ext_modules=[
        Extension("megaseq._csrc", sources=sources("*.cc"), depends=[*sources("*.h"), "CMakeLists.txt"], optional=True)
    ],
    cmdclass={"build_ext": CMakeBuild},
)
