"""`megaseq hosts`: a run that training would refuse is refused here, with the arguments of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaseq.cli.main import main
from megaseq.parallel.hostfile import Capacity

NUMBERS = ("quickstart.Numbers", "train_input.batching.rows=16")


@pytest.fixture
def hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two machines with four slots each, both of which answer."""
    path = tmp_path / "hosts"
    path.write_text("a slots=4\nb slots=4\n", encoding="utf-8")
    answers = {name: Capacity(gpus=8, cores=64) for name in ("a", "b")}
    monkeypatch.setattr("megaseq.parallel.hostfile.check_hosts", lambda hosts, *, path: answers)
    return str(path)


def test_the_arguments_of_training_are_taken(hostfile: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*NUMBERS, "parallel.tensor=2", "--run-dir", "runs/none", "--allow-changed-params", "seed=3"]
    assert main(["hosts", hostfile, *arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: 4 processes, 8 GPUs, 64 cores",
        "b: 4 processes, 8 GPUs, 64 cores",
        "8 processes: data=4 x tensor=2",
    ]
    assert not Path("runs/none").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.pipe=2", "parallel.zero.stage=3"],
            "parallel.zero.stage: must be below 3 where parallel.pipe is above 1, but is 3. DeepSpeed's stage 3 "
            "gathers parameters in an order that all ranks of the run must share. The nearest that works is",
        ),
        (["parallel.tensor=3"], "parallel: must have axes whose product is the number of processes, but is"),
        (["parallel.sequence=true"], "parallel.sequence: must be false where tensor is 1, but is true."),
        (["train.max_step=3"], "train.max_step: Program has no such param; did you mean max_steps?"),
    ],
)
def test_what_training_refuses_is_refused(
    overrides: list[str], said: str, hostfile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hosts", hostfile, *NUMBERS, *overrides]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megaseq: {said}")


def test_without_a_name_hosts_alone_are_checked(hostfile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hosts", hostfile]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
