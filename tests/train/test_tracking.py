"""Where figures go."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megaseq.train.tracking import RunFacts, Sample, Tracking
from megaseq.train.tracking.git import git_state
from megaseq.train.tracking.jsonl import JsonlWriter, read_metrics
from megaseq.train.tracking.progress import BarProgress, PlainProgress, duration_text, metrics_lines, samples_text
from megaseq.train.tracking.wandb import WandbWriter, stored_run_id

SAMPLES = [Sample(source="ab", output="b", reference="ba")]


def facts(run_dir: Path, *, first_step: int = 0) -> RunFacts:
    return RunFacts(
        name="test.Tiny",
        run_dir=run_dir,
        params={"task.model_dim": 16},
        first_step=first_step,
        max_steps=100,
        git={"commit": "0" * 40},
    )


def test_metrics_file_lists_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    first.on_start(facts(tmp_path))
    for step in (10, 20, 30):
        first.on_metrics({"train/loss": 1.0 / step}, step=step)
    # Killed in the middle of a line, and gone on with from a checkpoint of step 20.
    with path.open("a") as file:
        file.write('{"step": 40, "train/lo')
    second = JsonlWriter(path)
    second.on_start(facts(tmp_path, first_step=20))
    second.on_metrics({"train/loss": 0.5}, step=30)
    second.on_finish(status="finished")
    assert [(r["step"], r["train/loss"]) for r in read_metrics(path)] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_file_is_json_even_with_nan(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_metrics({"a": math.nan, "b": -math.inf}, step=1)
    writer.on_finish(status="finished")
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert math.isnan(float(record["a"])) and float(record["b"]) == -math.inf


class FakeRun:
    """What wandb.init returns, as far as we use it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.logged, self.summary = settings, [], {}
        self.axes: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []
    fake = types.ModuleType("wandb")

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(settings))
        return runs[-1]

    fake.init = init  # type: ignore[attr-defined]
    fake.Table = lambda columns, data: ("table", columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, wandb_runs: list[FakeRun], monkeypatch: Any) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for first_step in (0, 20):
        writer = WandbWriter(project="p", tags=("a",))
        writer.on_start(facts(tmp_path, first_step=first_step))
        writer.on_metrics({"train/loss": 2.0}, step=first_step + 10)
        writer.on_samples(SAMPLES, step=first_step + 10, name="valid")
        writer.on_finish(status="stopped")
    first, second = wandb_runs
    assert first.settings["id"] == second.settings["id"] == stored_run_id(tmp_path)
    assert first.settings["resume"] == "allow" and first.settings["mode"] == "offline"
    assert first.settings["config"]["params"] == {"task.model_dim": 16}
    assert first.settings["config"]["git"] == {"commit": "0" * 40}
    assert first.axes == [("step", None), ("*", "step")]
    assert second.logged[0] == {"train/loss": 2.0, "step": 30}
    table = second.logged[1]["decode/valid/samples"]
    assert table == ("table", ["step", "source", "output", "reference"], [[30, "ab", "b", "ba"]])
    assert second.summary == {"status": "stopped"} and second.exit_code == 0


def test_wandb_mode(tmp_path: Path, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    cases = [("auto", {}, "offline"), ("auto", {"WANDB_API_KEY": "k"}, "online"), ("disabled", {}, "disabled")]
    cases.append(("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"))
    for asked, environment, expected in cases:
        with monkeypatch.context() as context:
            for name, value in environment.items():
                context.setenv(name, value)
            WandbWriter(project="p", mode=asked).on_start(facts(tmp_path))
        assert wandb_runs[-1].settings["mode"] == expected


@pytest.mark.slow
def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WandbWriter(project="p")
    writer.on_start(facts(tmp_path))
    writer.on_metrics({"train/loss": 2.0}, step=10)
    writer.on_samples(SAMPLES, step=10, name="valid")
    writer.on_finish(status="finished")
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{stored_run_id(tmp_path)}"))


def test_tensorboard_writes_what_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = Tracking.Params(tensorboard=True, progress="none").instantiate().callbacks(run_dir=tmp_path)
    for callback in callbacks:
        callback.on_start(facts(tmp_path))
        callback.on_metrics({"train/loss": 2.5}, step=10)
        callback.on_samples(SAMPLES, step=10, name="valid")
        callback.on_finish(status="finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [scalar] = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (10, 2.5)


def test_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream)
    plain.on_start(facts(tmp_path, first_step=10))
    plain.on_metrics({"train/loss": 1.25, "train/tokens_per_second": 12345.6, "train/padding_fraction": 0.05}, step=20)
    plain.on_metrics({"eval/valid/loss": 1.5}, step=20)
    plain.on_samples(SAMPLES, step=20, name="valid")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 20/100  loss 1.2500  12,346 tokens/s  padding 5.0%  left ")
    assert lines[1] == "step 20/100  eval/valid:  loss 1.5"
    assert lines[2:] == ["valid at step 20:", "  source     ab", "  output     b", "  reference  ba"]


def test_bar_runs_from_start_to_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = BarProgress()
    bar.on_message("before")
    bar.on_start(facts(tmp_path, first_step=10))
    bar.on_progress(step=11)
    bar.on_metrics({"train/loss": 1.25, "train/tokens_per_second": 1000.0}, step=20)
    bar.on_metrics({"eval/valid/loss": 1.5}, step=20)
    bar.on_samples(SAMPLES, step=20, name="[valid]")
    bar.on_finish(status="finished")
    text = capsys.readouterr().err
    assert "before" in text and "20/100" in text and "[valid] at step 20" in text and "loss 1.250" in text


@pytest.mark.parametrize(
    ("progress", "kind"), [("auto", PlainProgress), ("plain", PlainProgress), ("bar", BarProgress)]
)
def test_progress_by_params(tmp_path: Path, progress: Any, kind: type) -> None:
    made = Tracking.Params(progress=progress).instantiate().callbacks(run_dir=tmp_path)
    assert [type(callback) for callback in made] == [JsonlWriter, kind]
    assert len(Tracking.Params(progress="none").instantiate().callbacks(run_dir=tmp_path)) == 1


def test_texts() -> None:
    assert [duration_text(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
    assert metrics_lines({"train/loss": 1.0, "train/steps_per_second": 2.0}) == ["loss 1.0000"]
    figures = {"eval/a/loss": 1.23456, "eval/a/tokens": 16180.0, "eval/b/loss": 2.0}
    assert metrics_lines(figures) == ["eval/a:  loss 1.235  tokens 16,180", "eval/b:  loss 2"]


def test_git_state_outside_a_checkout_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = git_state()
    assert not state or (len(state["commit"]) == 40 and state["dirty"] in ("true", "false"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {} and os.environ["PATH"] == str(tmp_path)


def test_a_text_without_end_does_not_fill_the_terminal() -> None:
    sample = Sample(source="zwei", output="two " * 500, reference="two")
    source, output, reference = samples_text([sample], name="valid", step=3).splitlines()[1:]
    assert (source, reference) == ("  source     zwei", "  reference  two")
    assert output == f"  output     {'two ' * 100}... (1600 characters more)"
