"""Evaluation and decoding of checkpoints, and following a run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megaseq.base.errors import CheckpointError, DataError, TrainingError
from megaseq.learner import MovingAverage
from megaseq.train import decoder, evaler
from megaseq.train.jobs import Job, watch_run
from megaseq.train.run_dir import RunDirectory
from megaseq.train.saving import load_trained
from megaseq.train.tracking import Callbacks
from megaseq.train.tracking.jsonl import read_metrics
from megaseq.train.trainer import Trainer
from megaseq.train.watch import Watch

from .tiny import run_params


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 4 and 8 and a moving average."""
    directory = tmp_path_factory.mktemp("jobs")
    params = run_params(directory, max_steps=8, ema=MovingAverage.Params(decay=0.5))
    Trainer(params, run_dir=directory / "run").fit()
    return directory / "run"


def logged(run: Path, name: str, *, step: int) -> float:
    return next(r[name] for r in read_metrics(run / "metrics.jsonl") if r["step"] == step and name in r)


def test_evaluation_of_a_checkpoint_is_that_of_training(run: Path) -> None:
    newest = evaler.evaluate_checkpoint(run)
    assert newest["eval/valid/loss"] == pytest.approx(logged(run, "eval/valid/loss", step=8), rel=1e-6)
    assert newest["eval/valid/tokens"] == logged(run, "eval/valid/tokens", step=8)
    older = evaler.evaluate_checkpoint(run / "checkpoints" / "step_00000004")
    assert older["eval/valid/loss"] == pytest.approx(logged(run, "eval/valid/loss", step=4), rel=1e-6)
    raw = evaler.evaluate_checkpoint(run, averaged=False)
    assert raw["eval/valid/loss"] != pytest.approx(newest["eval/valid/loss"], rel=1e-6)


def test_checkpoint_alone_is_enough(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints" / "step_00000008", alone)
    sources = (run.parent / "valid.in").read_text().splitlines()
    decoded = list(decoder.decode_lines(alone, lines=[f"{line}\n" for line in sources], lines_at_once=4))
    assert [source for source, _ in decoded] == sources
    expected = (run / "decodes" / "step_00000008" / "valid.hyp.txt").read_text().splitlines()
    assert [found[0].text for _, found in decoded] == expected
    assert evaler.evaluate_checkpoint(alone)["eval/valid/loss"] == pytest.approx(
        logged(run, "eval/valid/loss", step=8), rel=1e-6
    )


def test_decoding_reports_scores_with_signatures(run: Path) -> None:
    lines: list[str] = []
    figures = decoder.decode_checkpoint(run / "checkpoints" / "step_00000004", report=lines.append)
    assert set(figures) == {"decode/valid/bleu", "decode/valid/chrf", "decode/valid/exact_match"}
    assert lines[0].startswith("valid step 4 bleu ") and "tok:13a" in lines[0]
    assert lines[-1] == f"hypotheses: {run / 'decodes' / 'step_00000004'}"
    assert (run / "decodes" / "step_00000004" / "valid.hyp.txt").is_file()


def test_search_can_be_changed_for_a_checkpoint(run: Path) -> None:
    def edit(params: object) -> None:
        params.set("task.search.num_hyps_per_beam", 3).set("task.search.num_best", 3)  # type: ignore[attr-defined]

    [(_, hypotheses)] = decoder.decode_lines(run, lines=["abc"], edit=edit)
    assert len(hypotheses) == 3
    assert hypotheses[0].score >= hypotheses[1].score >= hypotheses[2].score


def test_another_tokenizer_than_the_checkpoints_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    params = RunDirectory(copy).read_params()
    state = copy / "checkpoints" / "step_00000008" / "state.json"
    trained = json.loads(state.read_text())["vocabulary"]

    def edit(params: object) -> None:
        params.set("vocabulary.source.tags", ("<x>",))  # type: ignore[attr-defined]

    with pytest.raises(DataError, match=f"vocabulary that it was trained with, {trained[:16]}"):
        load_trained(copy, edit=edit)
    params.vocabulary.source.tags = ("<x>",)
    params.train.max_steps = 9
    with pytest.raises((DataError, CheckpointError)):
        Trainer(params, run_dir=copy, allow_changed_params=True).fit()


def test_weights_of_a_checkpoint_are_its_averages(run: Path) -> None:
    averaged, raw = load_trained(run).task, load_trained(run, averaged=False).task
    name = "encoder.layers.0.ffn.up.weight"
    assert not torch.equal(averaged.get_parameter(name), raw.get_parameter(name))


def test_path_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a checkpoint, or a run directory with one"):
        load_trained(tmp_path)
    with pytest.raises(TrainingError, match=r"must be a run directory, with params\.yaml in it"):
        evaler.watch(tmp_path, edit=lambda params: None)


def test_watch_takes_each_checkpoint_once_and_ends_with_training(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    evaler.watch(copy, edit=lambda params: None, poll_seconds=0.05)
    records = [r for r in read_metrics(copy / "eval" / "metrics.jsonl")]
    assert [record["step"] for record in records] == [4, 8]
    assert records[1]["eval/valid/loss"] == pytest.approx(logged(run, "eval/valid/loss", step=8), rel=1e-6)
    assert json.loads((copy / "eval" / "status.json").read_text()) == {"done": [4, 8]}
    evaler.watch(copy, edit=lambda params: None, poll_seconds=0.05)
    assert len(list(read_metrics(copy / "eval" / "metrics.jsonl"))) == 2
    lines: list[str] = []
    decoder.watch(copy, report=lines.append, edit=lambda params: None, poll_seconds=0.05)
    assert [record["step"] for record in read_metrics(copy / "decode" / "metrics.jsonl")] == [4, 8]


def test_watch_waits_for_checkpoints_to_come(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.write_status(step=0, status="running")
    status_file = tmp_path / "job" / "status.json"
    seen: list[int] = []

    def follow() -> None:
        watch = Watch(run_dir, status_file=status_file, poll_seconds=0.01)
        for step in watch.steps():
            seen.append(step)
            watch.mark_done(step)

    thread = threading.Thread(target=follow)
    thread.start()
    for step in (10, 20):
        (run_dir.checkpoints / f"step_{step:08d}").mkdir(parents=True)
        time.sleep(0.05)
    run_dir.write_status(step=20, status="stopped")
    time.sleep(0.05)
    assert thread.is_alive()
    run_dir.write_status(step=20, status="finished")
    thread.join(timeout=10)
    assert not thread.is_alive() and seen == [10, 20]


def test_watch_passes_over_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    next((copy / "checkpoints" / "step_00000004").glob("task*.safetensors")).write_bytes(b"")
    evaler.watch(copy, edit=lambda params: None, poll_seconds=0.05)
    assert [record["step"] for record in read_metrics(copy / "eval" / "metrics.jsonl")] == [8]


def test_watch_that_fails_tells_its_trackers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    heard: list[str] = []
    monkeypatch.setattr(Callbacks, "on_finish", lambda self, *, status: heard.append(status))

    def fails(model: object, validation: object) -> dict[str, float]:
        raise DataError("no such file")

    with pytest.raises(DataError, match="no such file"):
        watch_run(Job(name="eval", work=fails), path=copy, poll_seconds=0.05)
    assert heard == ["failed"]
