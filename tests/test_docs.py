"""Every command in README and docs runs, word for word but for what makes it small enough for a test."""

from __future__ import annotations

import gzip
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaseq.kernels.bench.ledger import ledger, replaced
from megaseq.kernels.dispatch import IMPLEMENTATIONS
from tests.distributed.launching import FAKE_PDSH, FAKE_SBATCH, FAKE_SRUN, FAKE_SSH, write_program

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

SHRUNK_RUN = [
    "train.max_steps=3", "train.max_minutes=0.0", "train.eval_interval_steps=2", "train.log_interval_steps=1",
    "task.encoder.num_layers=1", "task.decoder.num_layers=1", "task.search.target_seq_len=8",
]  # fmt: skip
"""Put behind every `megaseq train`; the last value of a param on a command line counts."""
SHRUNK_BENCHMARKS = {
    "train_cpu.py": ["--seconds", "1", "--rounds", "1", "--tokens", "256", "--precision", "fp32"],
    "before_after.py": ["--before", str(ROOT), "--python", sys.executable, "--steps", "2", "--tokens", "256"],
    "decode_cpu.py": ["--sources", "4", "--batch-sizes", "2", "--repeats", "1"],
    "decode_gpu.py": [
        "--batch-sizes",
        "2",
        "--steps",
        "5",
        "--repeats",
        "1",
        "--model-dim",
        "32",
        "--num-layers",
        "1",
        "--vocab-size",
        "300",
    ],
    "input_5m.py": ["--pairs", "20000", "--seconds", "1"],
    "checkpoint.py": ["--megabytes", "1", "--ranks", "1", "2", "--repeats", "1"],
    "local_sgd.py": ["--steps", "4", "--common-steps", "2", "--inner-steps", "1", "--workers", "2"],
    "scaling.py": ["--steps", "1", "--rounds", "1", "--model-dim", "32", "--num-layers", "1", "--layouts", "data=2"],
    "packing.py": ["--pairs", "20000", "--vocab-size", "300"],
    "train_gpu.py": [
        *("--rows", "2", "--source-length", "16", "--target-length", "8", "--steps", "1", "--model-dim", "64"),
        *("--hidden-dim", "64", "--num-heads", "1", "--num-layers", "1", "--vocab-size", "100"),
    ],
    "offload.py": ["--steps", "1", "--vocab-size", "300", "--model-dim", "32"],
}
NOT_RUN = {
    "bash launch/test.sh": "it is what runs this test",
    ".venv/bin/pip install -c constraints.txt -e '.[deepspeed,kernels,wandb,tensorboard]'": "tests have all of it",
    "source .venv/bin/activate": "the test has an environment already",
}
LAUNCHERS = ("launch/torchrun.sh", "launch/deepspeed.sh", "launch/slurm/train.sbatch", "deepspeed")
"""Words of commands that train with several processes."""
GENERATED_DATA_DIR = "data/multi30k"
"""The folder that README and docs name; the test puts a small made-up corpus there."""


def commands(page: Path) -> list[str]:
    """Returns the commands in the fenced `bash` blocks of `page`, continued lines joined, comments dropped."""
    found: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("  #")[0].strip()
            if command and not command.startswith("#"):
                found.append(command)
    return found


def write_corpus(folder: Path) -> None:
    """Writes a corpus under Multi30k's file names: enough different words for 8,000 pieces."""
    folder.mkdir(parents=True)
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghiklmnoprstuw", k=draw.randint(3, 10))) for _ in range(12_000)]
    for name, lines in (("train", 4000), ("val", 12), ("test_2016_flickr", 12)):
        for language in ("de", "en"):
            text = "".join(" ".join(draw.choices(words, k=draw.randint(4, 12))) + "\n" for _ in range(lines))
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))


def write_modules(page: Path, folder: Path) -> None:
    """Writes each `python` block that the text introduces as `in NAME.py:` to that file."""
    pattern = r"`(\w+\.py)`:\n\n```python\n(.*?)^```$"
    for name, block in re.findall(pattern, page.read_text(), flags=re.MULTILINE | re.DOTALL):
        (folder / name).write_text(block)


def shrink(command: str) -> str:
    """Returns `command` with what makes it small put behind its arguments, or behind those of its part of a pipe."""
    parts = command.split(" | ")
    for index, part in enumerate(parts):
        words = shlex.split(part)
        if words[:2] == ["megaseq", "train"]:
            extra = [] if "quickstart" not in part else ["train_input.source.num_examples=3000"]
            parts[index] = shlex.join([*words, *SHRUNK_RUN, *extra])
        elif set(words) & set(LAUNCHERS):
            extra = ["train_input.source.num_examples=3000"] if "quickstart" in part else []
            parts[index] = f"{part} {shlex.join([*SHRUNK_RUN, 'train.num_threads=1', *extra])}"
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            smaller = SHRUNK_BENCHMARKS[Path(words[1]).name]
            parts[index] = shlex.join(["python", str(ROOT / words[1]), *words[2:], *smaller])
        elif words[:3] == ["megaseq", "bench", "kernels"]:
            # Proves without timing, with a GPU as without.
            parts[index] = shlex.join([*words, "--check", "--ops", "norm"])
        elif words[:2] == ["bash", "launch/quickstart.sh"]:
            small = [*SHRUNK_RUN, "train_input.source.num_examples=3000", "eval_inputs.held_out.source.num_examples=8"]
            parts[index] = shlex.join(["bash", str(ROOT / words[1]), *words[2:], *small])
    return " | ".join(parts)


def write_launchers(folder: Path, *, programs: Path) -> None:
    """Puts launch/, configs/ and docs/ in `folder`, and in `programs` what reaches other machines: it runs here."""
    for name in ("launch", "configs", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    hostfile = folder / "launch/hostfile.example"
    hostfile.write_text(re.sub("slots=.*", "slots=2", hostfile.read_text()))
    for name, text in (("pdsh", FAKE_PDSH), ("srun", FAKE_SRUN), ("ssh", FAKE_SSH), ("sbatch", FAKE_SBATCH)):
        write_program(programs / name, text)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` and `megaseq` are those of the tests, and a corpus in the working directory."""
    write_corpus(tmp_path / GENERATED_DATA_DIR)
    programs = tmp_path / "bin"
    programs.mkdir()
    write_launchers(tmp_path, programs=programs)
    for name, arguments in (("python", ""), ("megaseq", " -m megaseq")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "MEGASEQ_RUN_DIR": str(tmp_path / "runs/quickstart"),
        "WANDB_MODE": "offline",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_page(page: Path, shell: dict[str, str], tmp_path: Path) -> None:
    write_modules(page, tmp_path)
    for command in commands(page):
        if command in NOT_RUN:
            continue
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            shell[name] = value
            continue
        done = subprocess.run(
            ["bash", "-ec", shrink(command)],
            cwd=tmp_path,
            env=shell,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_readme_shows_the_two_commands_and_the_main_job() -> None:
    shown = commands(ROOT / "README.md")
    assert "bash launch/quickstart.sh" in shown
    assert "bash launch/test.sh" in shown
    assert any(command.startswith("megaseq train mt.multi30k.") for command in shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:megaseq|launch|benchmarks|configs|docs|tests)/[\w./]+\.\w+)`", page.read_text())
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_left_open(page: Path) -> None:
    assert "@@" not in page.read_text()


def test_the_ledger_of_kernels_is_that_of_this_source() -> None:
    page = ROOT / "docs/kernels.md"
    now = replaced(page.read_text(), content=ledger(page.parent / "kernel_results"))
    assert page.read_text() == now, "kernels have changed; run: python -m megaseq bench ledger docs/kernels.md"


def test_every_op_is_on_the_page_of_kernels() -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    assert [op for op in IMPLEMENTATIONS if f"| `{op}` |" not in text] == []


def test_every_benchmark_is_on_a_page() -> None:
    shown = " ".join(command for page in PAGES for command in commands(page))
    assert set(SHRUNK_BENCHMARKS) == {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert all(f"benchmarks/{name}" in shown for name in SHRUNK_BENCHMARKS)
