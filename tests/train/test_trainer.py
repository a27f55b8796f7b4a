"""The training job, in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megaseq.base.errors import CheckpointError, DataError, ParamsError, TrainingError
from megaseq.checkpoint import Checkpointer, WarmStart, list_steps, load_checkpoint
from megaseq.data import Input, Vocabulary
from megaseq.learner import MovingAverage, ParameterRule
from megaseq.train import parts
from megaseq.train.device import resolve_device
from megaseq.train.early_stop import EarlyStop
from megaseq.train.run_dir import ChangedParamsError, RunDirectory, write_atomically
from megaseq.train.saving import load_trained
from megaseq.train.signals import Interrupted
from megaseq.train.tracking import Callback, Sample
from megaseq.train.tracking.jsonl import read_metrics
from megaseq.train.trainer import Trainer

from .tiny import run_params


class Recorder(Callback):
    """Keeps what it hears; raises `signal_at` after that step, as a scheduler would."""

    def __init__(self, *, signal_at: int = 0, number: int = signal.SIGTERM) -> None:
        self.messages: list[str] = []
        self.samples: list[tuple[str, list[Sample]]] = []
        self.status = ""
        self._signal_at, self._number = signal_at, number

    def on_progress(self, *, step: int) -> None:
        if step == self._signal_at:
            os.kill(os.getpid(), self._number)

    def on_samples(self, samples: Any, *, step: int, name: str) -> None:
        self.samples.append((name, list(samples)))

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    def on_finish(self, *, status: str) -> None:
        self.status = status


def training_lines(run_dir: Path) -> list[Mapping[str, Any]]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in record]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in training_lines(run_dir)]


def test_run_directory_after_a_whole_run(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=8)
    recorder = Recorder()
    run = tmp_path / "run"
    assert Trainer(params, run_dir=run, callbacks=[recorder]).fit() == "finished"
    assert recorder.status == "finished"
    assert RunDirectory(run).read_params() == params
    assert RunDirectory(run).read_status() == {"status": "finished", "step": 8}
    assert "task.model_dim : 16" in (run / "params.txt").read_text()
    assert list_steps(run / "checkpoints") == [4, 8]
    assert [line["step"] for line in training_lines(run)] == list(range(1, 9))
    records = list(read_metrics(run / "metrics.jsonl"))
    assert [r["step"] for r in records if "eval/valid/loss" in r] == [4, 8]
    assert [r["step"] for r in records if "decode/valid/bleu" in r] == [8]
    last = training_lines(run)[-1]
    assert last["train/loss"] < training_lines(run)[0]["train/loss"]
    assert 0.0 <= last["train/padding_fraction"] < 1.0 and last["train/tokens_per_second"] > 0
    decoded = run / "decodes" / "step_00000008"
    assert len((decoded / "valid.hyp.txt").read_text().splitlines()) == 6
    assert (decoded / "valid.ref.txt").read_text() == (tmp_path / "valid.out").read_text()
    assert set(json.loads((decoded / "valid.scores.json").read_text())) == {"bleu", "chrf", "exact_match"}
    assert json.loads((decoded / "valid.jsonl").read_text().splitlines()[0])["hypotheses"][0]["logprob"] < 0
    assert [name for name, _ in recorder.samples] == ["valid"]
    assert len(recorder.samples[0][1]) == 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path: Path, packed: bool, stop: int) -> None:
    params = run_params(tmp_path, max_steps=9, packed=packed, ema=MovingAverage.Params(decay=0.9))
    params.task.decoder.dropout = 0.1
    params.train.log_interval_steps = 2
    Trainer(params, run_dir=tmp_path / "whole").fit()
    recorder = Recorder(signal_at=stop)
    assert Trainer(params, run_dir=tmp_path / "parts", callbacks=[recorder]).fit() == "stopped"
    assert recorder.messages[-1] == f"SIGTERM: saved at step {stop}, the same command goes on"
    (kernels,) = [message for message in recorder.messages if message.startswith("kernels: ")]
    assert "cross_entropy" in kernels and "norm torch" in kernels
    assert RunDirectory(tmp_path / "parts").read_status() == {"status": "stopped", "step": stop}
    assert list_steps(tmp_path / "parts" / "checkpoints")[-1] == stop
    assert Trainer(params, run_dir=tmp_path / "parts").fit() == "finished"
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole.step == parts.step == 9
    assert whole.state["data"] == parts.state["data"]
    assert whole.state["learner"] == parts.state["learner"]
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name]), name


def test_sigint_saves_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    recorder = Recorder(signal_at=2, number=signal.SIGINT)
    assert Trainer(run_params(tmp_path), run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "stopped"
    assert list_steps(tmp_path / "run" / "checkpoints") == [2]
    assert signal.getsignal(signal.SIGINT) is before


def test_run_at_max_steps_says_so(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=4)
    Trainer(params, run_dir=tmp_path / "run").fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "finished"
    assert "already trained to step 4: train.max_steps=4. Raise it, with --allow-changed-params" in recorder.messages[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


class SignalWhen(Recorder):
    """Raises SIGTERM when a figure of that name, or a sample, comes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._name in metrics and step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_samples(self, samples: Any, *, step: int, name: str) -> None:
        super().on_samples(samples, step=step, name=name)
        if self._name == "samples":
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("when", ["train/loss", "eval/valid/loss", "samples", "decode/valid/bleu"])
@pytest.mark.parametrize("max_steps", [8, 9])
def test_evaluation_that_a_signal_interrupts_is_done_after_the_restart(
    tmp_path: Path, when: str, max_steps: int
) -> None:
    params = run_params(tmp_path, max_steps=max_steps)
    params.train.decode_interval_steps = 8
    params.train.early_stop = EarlyStop.Params(metric="eval/valid/loss", window_steps=100)
    Trainer(params, run_dir=tmp_path / "whole").fit()
    interrupted = SignalWhen(when)
    assert Trainer(params, run_dir=tmp_path / "parts", callbacks=[interrupted]).fit() == "stopped"
    assert interrupted.messages[-1] == "SIGTERM: saved at step 8, the same command goes on"
    assert Trainer(params, run_dir=tmp_path / "parts").fit() == "finished"

    def figures(name: str) -> list[tuple[int, tuple[str, ...]]]:
        return [(r["step"], tuple(r)) for r in read_metrics(tmp_path / name / "metrics.jsonl")]

    assert figures("parts") == figures("whole")
    assert (tmp_path / "parts/decodes/step_00000008/valid.scores.json").is_file()
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoints" / "step_00000008") for name in ("whole", "parts"))
    assert whole.metrics == parts.metrics and set(parts.metrics) > {"eval/valid/loss", "decode/valid/bleu"}
    assert whole.state["early_stop"] == parts.state["early_stop"] and parts.state["pending"] is None
    recorder = Recorder()
    Trainer(params, run_dir=tmp_path / "parts", callbacks=[recorder]).fit()
    assert "already trained" in recorder.messages[0]


def test_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=50, learning_rate=0.0)
    params.train.eval_interval_steps = 2
    params.train.early_stop = EarlyStop.Params(metric="eval/valid/loss", window_steps=4)
    Trainer(params, run_dir=tmp_path / "run").fit()
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "finished"
    assert "already trained to step 6: eval/valid/loss has not improved on" in recorder.messages[0]


def test_second_trainer_in_the_directory_is_refused(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=2)
    (tmp_path / "run").mkdir()
    hold = (
        "import sys\nfrom megaseq.train.run_dir import RunDirectory\n"
        "run_dir = RunDirectory(sys.argv[1])\nrun_dir.lock()\nprint('held', flush=True)\ninput()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=rf"one process at a time, but is in use by process {holder.pid} on"):
            Trainer(params, run_dir=tmp_path / "run")
        assert not (tmp_path / "run" / "params.yaml").exists()
        holder.kill()
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_begins_with_the_parameters_of_another(tmp_path: Path, precision: str) -> None:
    params = run_params(tmp_path, max_steps=4, ema=MovingAverage.Params(decay=0.5))
    Trainer(params, run_dir=tmp_path / "other").fit()
    other = load_checkpoint(tmp_path / "other").tensors
    params.init_from = WarmStart.Params(path=str(tmp_path / "other"))
    params.train.max_steps, params.train.precision, params.learner.learning_rate = 2, precision, 0.0
    recorder = Recorder(signal_at=1)
    Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit()
    (line,) = [message for message in recorder.messages if message.startswith("begins with")]
    assert "step_00000004" in line and "0 keep their initial values" in line and "\n" not in line
    shutil.rmtree(tmp_path / "other")  # Only a run that begins reads it.
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"
    own = load_checkpoint(tmp_path / "run").tensors
    for name, tensor in other.items():
        if name.startswith("ema."):
            assert torch.equal(own[name.removeprefix("ema.")], tensor), name
            assert torch.allclose(own[name], tensor), name


def test_bad_evaluation_data_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    with (tmp_path / "valid.in").open("ab") as file:
        file.write(b"a\xff\n")
    with (tmp_path / "valid.out").open("ab") as file:
        file.write(b"a\n")
    with pytest.raises(DataError, match=r"valid\.in:7: must be UTF-8"):
        Trainer(params, run_dir=tmp_path / "run").fit()
    assert not list(read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_run_that_never_began_may_begin_with_other_params(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=2)
    wrong = params.copy()
    wrong.train_input.source.data_dir = str(tmp_path / "nowhere")
    wrong.vocabulary.source.tags = ("<x>",)
    with pytest.raises(DataError, match="nowhere"):
        Trainer(wrong, run_dir=tmp_path / "run").fit()
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"
    assert RunDirectory(tmp_path / "run").read_params() == params


def test_missing_checkpoint_to_begin_with(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    params.init_from = WarmStart.Params(path=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing"):
        Trainer(params, run_dir=tmp_path / "run").fit()


def test_seed_of_the_run_orders_the_examples(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=1)
    states = []
    for name, seed, own in (("a", 1, None), ("b", 2, None), ("c", 2, 1)):
        params.seed, params.train_input.seed = seed, own
        Trainer(params, run_dir=tmp_path / name).fit()
        states.append(load_checkpoint(tmp_path / name).state["data"])
    assert states[0] != states[1] and states[0] == states[2]


def test_figures_that_nothing_gives_are_problems(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    params.train.decode_names = ("vaild",)
    params.train.early_stop = EarlyStop.Params(metric="eval/test/loss", window_steps=2)
    params.checkpoint.best_metric = "bleu"
    text = "\n".join(map(str, params.check()))
    assert "train.decode_names: must be among valid" in text
    assert "train.early_stop.metric: must be eval/NAME/FIGURE" in text and "'eval/test/loss'" in text
    assert "checkpoint.best_metric: must be" in text


def test_changed_params_are_refused_unless_allowed(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=4)
    Trainer(params, run_dir=tmp_path / "run").fit()
    params.train.max_steps = 6
    with pytest.raises(ChangedParamsError, match="--allow-changed-params") as caught:
        Trainer(params, run_dir=tmp_path / "run")
    assert caught.value.changes == ["train.max_steps : 4 -> 6"]
    recorder = Recorder()
    Trainer(params, run_dir=tmp_path / "run", allow_changed_params=True, callbacks=[recorder]).fit()
    assert "changed: train.max_steps : 4 -> 6" in recorder.messages
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert RunDirectory(tmp_path / "run").read_params() == params


def test_a_run_may_go_on_with_another_layout(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=4)
    Trainer(params, run_dir=tmp_path / "run").fit()
    params.parallel.zero.bucket_elements = 1000
    recorder = Recorder()
    Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit()
    assert RunDirectory(tmp_path / "run").read_params() == params
    params.train.max_steps = 6
    params.parallel.timeout_seconds = 60.0
    with pytest.raises(ChangedParamsError) as caught:
        Trainer(params, run_dir=tmp_path / "run")
    assert caught.value.changes == ["train.max_steps : 4 -> 6"]


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    with pytest.raises(TrainingError, match="must be a run directory, empty or new"):
        Trainer(params, run_dir=tmp_path)
    Trainer(params, run_dir=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"must hold a run of other\.Name, but is a run of test\.Tiny"):
        Trainer(params.replace(name="other.Name"), run_dir=tmp_path / "run")


def test_all_problems_of_params_come_at_once(tmp_path: Path) -> None:
    params = run_params(tmp_path)
    params.train.max_steps = 0
    params.task.label_smoothing = 1.5
    with pytest.raises(ParamsError) as caught:
        Trainer(params, run_dir=tmp_path / "run")
    assert "train.max_steps" in str(caught.value) and "task.label_smoothing" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_early_stop_ends_the_run(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=50, learning_rate=0.0)
    params.train.eval_interval_steps = 2
    params.train.early_stop = EarlyStop.Params(metric="eval/valid/loss", window_steps=4)
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "finished"
    assert RunDirectory(tmp_path / "run").read_status()["step"] == 6
    assert "eval/valid/loss has not improved on" in recorder.messages[-1]


def test_minutes_end_the_run(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=100_000)
    params.train.max_minutes = 1e-6
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "finished"
    assert recorder.messages[-1] == "finished at step 1: train.max_minutes is 1e-06"
    assert list_steps(tmp_path / "run" / "checkpoints") == [1]


def test_best_checkpoint_is_kept_by_the_metric_of_its_step(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=12)
    params.checkpoint = Checkpointer.Params(
        interval_steps=4, keep_last=1, keep_best=1, best_metric="eval/valid/loss", best_mode="max"
    )
    Trainer(params, run_dir=tmp_path / "run").fit()
    # The loss falls, so the one with the highest is the first.
    assert list_steps(tmp_path / "run" / "checkpoints") == [4, 12]


def test_corrupted_newest_checkpoint_falls_back(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=8)
    Trainer(params, run_dir=tmp_path / "whole").fit()
    Trainer(params, run_dir=tmp_path / "run", callbacks=[Recorder(signal_at=6)]).fit()
    victim = max((tmp_path / "run/checkpoints/step_00000006").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "finished"
    assert "Going on from step 4." in recorder.messages[0] and victim.name in recorder.messages[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_failure_is_recorded(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=8, learning_rate=1e30, clip_norm=None)
    params.learner.skip.max_consecutive = 2
    recorder = Recorder()
    with pytest.raises(TrainingError, match="must not skip 2 updates in a row"):
        Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit()
    assert recorder.status == "failed"
    assert RunDirectory(tmp_path / "run").read_status()["status"] == "failed"


def test_second_sigint_exits_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from megaseq.train.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert signals.requested == 'SIGINT'\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 130
    assert "stopped at once" in done.stderr


def test_what_the_patterns_match_is_written(tmp_path: Path) -> None:
    params = run_params(tmp_path, max_steps=1, freeze_patterns=(r"norm",))
    params.learner.rules = (ParameterRule.Params(pattern="embedding", weight_decay=0.5),)
    recorder = Recorder()
    Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit()
    lines = (tmp_path / "run" / "parameters.txt").read_text().splitlines()
    (embedding,) = [line for line in lines if line.startswith("  task.source_embedding.weight  [")]
    assert "16]  weight_decay=0.5 learning_rate_scale=1  by embedding" in embedding
    assert any("norm" in line and line.endswith("  frozen  by norm") for line in lines)
    assert f"what each pattern of the learner matches: {tmp_path / 'run' / 'parameters.txt'}" in recorder.messages
    plain = Recorder()
    Trainer(run_params(tmp_path, max_steps=1), run_dir=tmp_path / "plain", callbacks=[plain]).fit()
    assert (tmp_path / "plain" / "parameters.txt").is_file()
    assert not any("parameters.txt" in message for message in plain.messages)


def test_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params = run_params(tmp_path, max_steps=1)
    recorder = Recorder()
    Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit()
    assert "fp32 on cpu, vocabulary of" in recorder.messages[0]
    params.train.device = "cuda"
    with pytest.raises(ParamsError) as caught:
        Trainer(params, run_dir=tmp_path / "other")
    assert str(caught.value).startswith("train.device: must be a device of this machine, but is 'cuda'. ")
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()

    def edit(params: Any) -> None:
        params.train.device = "cuda"

    with pytest.raises(ParamsError, match=r"^train\.device"):
        load_trained(tmp_path / "run", edit=edit)
    assert load_trained(tmp_path / "run").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "found", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_of_the_params(asked: str, found: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert resolve_device(asked) == torch.device(device)


@pytest.mark.parametrize("where", ["read_vocabulary", "train_input", "task_params"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_signal_during_set_up_ends_at_once(
    tmp_path: Path, where: str, number: int, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = run_params(tmp_path, max_steps=2)
    (tmp_path / "run").mkdir()
    whole = getattr(parts, where)

    def interrupted(*args: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), number)
            pytest.fail("goes on after the signal")
        except Interrupted:
            if not wrapped:
                raise
            raise TrainingError("a library's own words") from None

    if where == "read_vocabulary":
        monkeypatch.setattr(RunDirectory, "vocabulary", tmp_path)  # One that is there.
    monkeypatch.setattr(parts, where, interrupted)
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "stopped"
    name = signal.Signals(number).name
    assert recorder.messages == [f"{name}: nothing to save yet, the same command begins again"]
    assert recorder.status == "stopped" and RunDirectory(tmp_path / "run").read_status()["status"] == "stopped"
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.undo()
    assert getattr(parts, where) is whole
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"


def test_signal_before_the_first_batch_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = run_params(tmp_path, max_steps=2)

    def batches(self: Input) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield pytest.fail("goes on after the signal")

    monkeypatch.setattr(Input, "__iter__", batches)
    recorder = Recorder()
    assert Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder]).fit() == "stopped"
    assert recorder.messages[-1].startswith("SIGTERM: nothing to save yet")


def test_vocabulary_directory_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = run_params(tmp_path, max_steps=1)

    def fails(path: Path, data: str | bytes) -> None:
        if path.name == "target":
            raise OSError("disk full")
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "save_files", lambda self: {"source": b"1", "target": b"2"})
        patch.setattr("megaseq.train.trainer.write_atomically", fails)
        with pytest.raises(OSError, match="disk full"):
            Trainer(params, run_dir=tmp_path / "run").fit()
    assert not (tmp_path / "run" / "vocabulary").exists()
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"


@pytest.mark.parametrize("fails", [True, False])
def test_status_that_cannot_be_written_hides_no_error(
    tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = run_params(tmp_path, max_steps=8, **({"learning_rate": 1e30, "clip_norm": None} if fails else {}))
    params.learner.skip.max_consecutive = 2
    write = RunDirectory.write_status

    def full(self: RunDirectory, *, step: int, status: str) -> None:
        if status != "running":
            raise OSError("disk full")
        write(self, step=step, status=status)

    recorder = Recorder()
    trainer = Trainer(params, run_dir=tmp_path / "run", callbacks=[recorder])
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_status", full)
        with pytest.raises(TrainingError if fails else OSError, match="must not skip 2" if fails else "disk full"):
            trainer.fit()
    assert recorder.status == ("failed" if fails else "finished")
    assert recorder.messages[-1].endswith("disk full") is fails
    assert trainer.run_dir._lock is None
