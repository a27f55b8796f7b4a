"""mypy knows the fields of params: a misspelt one and a wrong type are caught before anything runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def mypy(name: str, *, cache: Path) -> str:
    """What mypy says about a file of this folder."""
    options = ["--strict", "--no-error-summary", "--no-pretty", "--config-file=", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={cache}", name]
    environment = {"MYPYPATH": f"{REPOSITORY}:{HERE}", "PATH": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for both runs."""
    return tmp_path_factory.mktemp("mypy")


def test_correct_params_pass(cache: Path) -> None:
    assert mypy("correct.py", cache=cache) == ""


def test_every_planted_mistake_is_caught_and_nothing_else(cache: Path) -> None:
    planted = {
        (number, line.rsplit("# error: ", 1)[1])
        for number, line in enumerate((HERE / "misspelt.py").read_text().splitlines(), 1)
        if "# error: " in line and not line.startswith('"""')
    }
    output = mypy("misspelt.py", cache=cache)
    found = re.findall(r"^misspelt\.py:(\d+): error: .*\[([\w-]+)\]$", output, flags=re.MULTILINE)
    assert {(int(number), code) for number, code in found} == planted, output
    assert 'Unexpected keyword argument "hiden_dim"' in output
