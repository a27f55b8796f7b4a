"""The command line: what it runs, and how it answers to mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaseq.cli import main as cli
from megaseq.cli.main import main
from megaseq.parallel.spawn import Batch
from megaseq.train.tracking.jsonl import read_metrics

TINY = (
    "train.log_interval_steps=1",
    "train.num_threads=1",
    "train_input.source.num_examples=2000",
    "train_input.batching.rows=4",
    "eval_inputs.held_out.source.num_examples=8",
    "task.model_dim=16",
    "task.encoder.num_layers=1",
    "task.decoder.num_layers=1",
    "task.search.num_hyps_per_beam=2",
    "task.search.target_seq_len=20",
    "tracking.progress=plain",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "quickstart.Numbers", "train.max_steps=3", "--run-dir", str(directory), *TINY]) == 0
    return directory


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megaseq", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        **options,  # type: ignore[call-overload]
    )


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("megaseq: ")
    return line


# ---- help and import time ------------------------------------------------------------------------------------------


def test_help_imports_no_torch_and_is_fast() -> None:
    code = "import sys; from megaseq.cli.main import build_parser; build_parser().format_help(); print(*sys.modules)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert time.perf_counter() - begin < 10
    modules = done.stdout.split()
    assert not {"torch", "numpy", "rich", "sacrebleu", "wandb"} & set(modules)


@pytest.mark.parametrize("command", ["train", "eval", "decode", "params", "checkpoint", "average"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: megaseq {command}" in capsys.readouterr().out


def test_overrides_may_stand_anywhere() -> None:
    arguments = cli.parse(["train", "a.B", "x=1", "--run-dir", "r", "y=2", "--data-dir", "d", "z=-1"])
    assert arguments.overrides == ["x=1", "y=2", "z=-1"]
    assert (arguments.run_dir, arguments.data_dir) == ("r", "d")


@pytest.mark.parametrize("stray", ["--run-dri", "word", "--x=1"])
def test_unknown_arguments_are_refused(stray: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["train", "a.B", "x=1", "--run-dir", "r", stray])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {stray}" in capsys.readouterr().err


# ---- what works ----------------------------------------------------------------------------------------------------


def test_train_again_says_that_it_is_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart.Numbers", "train.max_steps=3", "--run-dir", str(run), *TINY]) == 0
    assert "already trained to step 3: train.max_steps=3" in capsys.readouterr().err


def test_eval_prints_what_training_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    printed = dict(line.split(" : ") for line in capsys.readouterr().out.splitlines())
    logged = [r for r in read_metrics(run / "metrics.jsonl") if "eval/held_out/loss" in r][-1]
    assert float(printed["eval/held_out/loss"]) == pytest.approx(logged["eval/held_out/loss"], rel=1e-4)


def test_decode_prints_samples_and_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(run / "checkpoints" / "step_00000003"), "task.search.num_hyps_per_beam=1"]) == 0
    out = capsys.readouterr().out
    assert "held_out at step 3:" in out and "  source     <" in out and "  reference  " in out
    assert "held_out step 3 bleu " in out and "tok:13a" in out and "chrf" in out and "exact_match" in out


def test_decode_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "in.txt"
    text.write_text("<de> twenty-one\n<fr> seven\n\n", encoding="utf-8")
    output = tmp_path / "out.txt"
    assert main(["decode", str(run), "--input", str(text), "--output", str(output)]) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 3
    assert main(["decode", str(run), "--input", str(text), "--jsonl", "task.search.num_best=2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["source"] for record in records] == ["<de> twenty-one", "<fr> seven", ""]
    assert len(records[0]["hypotheses"]) == 2


def test_average_of_a_run_decodes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "average"
    assert main(["average", str(run), "--last", "1", "--output", str(out)]) == 0
    assert main(["eval", str(run)]) == 0
    expected = capsys.readouterr().out.splitlines()[-5:]
    assert main(["eval", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_yaml_overlay_comes_before_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "a.yaml"
    overlay.write_text("train:\n  max_steps: 7\n  log_interval_steps: 3\n", encoding="utf-8")
    assert main(["params", "show", "quickstart.Numbers", "-c", str(overlay), "train.max_steps=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train.max_steps : 9" in lines and "train.log_interval_steps : 3" in lines


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_unknown_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean quickstart.Numbers?" in one_line_error(capsys, "train", "quickstart.Number")


def test_misspelt_param(capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_error(capsys, "train", "quickstart.Numbers", "task.encoder.num_layer=2")
    assert "task.encoder.num_layer: Encoder has no such param; did you mean num_layers?" in line


def test_value_of_the_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.max_steps" in one_line_error(capsys, "train", "quickstart.Numbers", "train.max_steps=many")


def test_missing_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    arguments = ("mt.multi30k.Small", "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run"))
    assert "train.de.gz" in one_line_error(capsys, "train", *arguments)
    missing = one_line_error(capsys, "train", "mt.multi30k.Small", "--data-dir", str(tmp_path / "none"))
    assert "--data-dir: must be a directory" in missing
    assert "missing" in one_line_error(capsys, "train", "mt.multi30k.Small", "-c", str(tmp_path / "a.yaml"))


def test_directory_of_another_experiment(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_error(capsys, "train", "mt.multi30k.Small", "--data-dir", str(tmp_path), "--run-dir", str(run))
    assert "must hold a run of mt.multi30k.Small, but is a run of quickstart.Numbers" in line
    (tmp_path / "file").touch()
    line = one_line_error(capsys, "train", "quickstart.Numbers", "--run-dir", str(tmp_path))
    assert "a directory with other files in it" in line


def test_changed_params_print_their_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart.Numbers", "train.max_steps=5", "--run-dir", str(run), *TINY]) == 2
    changed, error = capsys.readouterr().err.splitlines()
    assert changed == "train.max_steps : 3 -> 5"
    assert error.endswith("Pass --allow-changed-params, or choose another directory.")


def test_checkpoint_with_another_tokenizer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_error(capsys, "eval", str(run), "vocabulary.source.tags=[<de>]")
    assert "must be used with the vocabulary that it was trained with" in line


def test_path_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("eval", "decode"):
        assert "must be a checkpoint, or a run directory" in one_line_error(capsys, command, str(tmp_path))
    assert "params.yaml" in one_line_error(capsys, "eval", str(tmp_path), "--watch")


def test_input_that_cannot_be_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\n")
    assert f"{bad}:2: must be UTF-8" in one_line_error(capsys, "decode", str(run), "--input", str(bad))
    missing = one_line_error(capsys, "decode", str(run), "--input", str(tmp_path / "none"))
    assert "must be a readable file" in missing
    assert "--watch" in one_line_error(capsys, "decode", str(run), "--input", "-", "--watch")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.data=20"], "The nearest that works is parallel.context=5 parallel.data=4."),
        (["parallel.pipe=2", "parallel.zero.stage=3"], "must be below 3 where parallel.pipe is above 1, but is 3."),
        (["parallel.tensor=2", "parallel.processes=3"], "have axes whose product is the number of processes"),
        (["parallel.tensor=2", "train.local_sgd.workers=2"], "parallel.tensor: must be off with train.local_sgd, but"),
        (["parallel.data=5", "train.local_sgd.workers=2"], "must have a row for each data rank"),
    ],
)
def test_a_layout_that_does_not_work_starts_no_process(
    overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*arguments: object, **options: object) -> int:
        raise AssertionError("a process was started")

    monkeypatch.setattr("megaseq.parallel.spawn.spawn", started)
    monkeypatch.setattr("megaseq.train.local_sgd.launch.run_workers", started)
    assert said in one_line_error(capsys, "train", "quickstart.Numbers", *TINY, *overrides)


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("megaseq.train.parts.check_params", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart.Numbers", "--run-dir", "unused"])


# ---- as a process --------------------------------------------------------------------------------------------------


def test_mistake_as_a_process() -> None:
    process = start("train", "quickstart.Numbers", "train.max_step=1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.splitlines() == ["megaseq: train.max_step: Program has no such param; did you mean max_steps?"]


@pytest.mark.slow
def test_stdin_to_stdout_as_a_process(run: Path) -> None:
    process = start("decode", str(run), "--input", "-")
    out, err = process.communicate("<de> twenty-one\n<fr> seven\n", timeout=120)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_signal_saves_and_exits_zero(tmp_path: Path, number: int, code: int) -> None:
    directory = tmp_path / "run"
    process = start("train", "quickstart.Numbers", "train.max_steps=100000", "--run-dir", str(directory), *TINY)
    deadline = time.monotonic() + 120
    while not list(read_metrics(directory / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    step = json.loads((directory / "status.json").read_text())["step"]
    assert (directory / "checkpoints" / f"step_{step:08d}").is_dir()
    assert f"{signal.Signals(number).name}: saved at step {step}" in err


def test_several_gpus_are_a_process_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[int] = []

    def spawn(arguments: list[str], *, batch: Batch) -> int:
        started.append(batch.count)
        return 0

    monkeypatch.setattr("megaseq.parallel.spawn.spawn", spawn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for overrides, line in (
        ([], "starts 4 processes for the 4 GPUs of this machine"),
        (["parallel.tensor=2"], "starts 4 processes for the 4 GPUs of this machine"),
        (["train.device=cpu", "parallel.tensor=2"], ""),
        (["parallel.data=3"], ""),
    ):
        assert main(["train", "quickstart.Numbers", *overrides, *TINY]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(line) and bool(printed) == bool(line)
    assert started == [4, 4, 2, 3]
