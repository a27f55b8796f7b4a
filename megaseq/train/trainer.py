"""The training job: steps, with evaluation, decoding and saving in between, until done or told to stop."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaseq.base import NestedMap
from megaseq.base.errors import MegaseqError
from megaseq.data.input import Input
from megaseq.data.vocabulary import Vocabulary
from megaseq.kernels.dispatch import automatic_choices
from megaseq.parallel.process import EndedElsewhereError, current_team
from megaseq.train import parts
from megaseq.train.agreement import Agreement, cells
from megaseq.train.device import device_name
from megaseq.train.early_stop import EarlyStop
from megaseq.train.engine import Engine
from megaseq.train.experiment import Run
from megaseq.train.local_sgd.worker import Worker
from megaseq.train.meter import Meter
from megaseq.train.program import Program
from megaseq.train.ranks import begin, placement
from megaseq.train.run_dir import RunDirectory, write_atomically
from megaseq.train.saving import Position, Saver
from megaseq.train.signals import Interrupted, StopSignals
from megaseq.train.spread import Spread
from megaseq.train.tracking import Callback, Callbacks, RunFacts
from megaseq.train.tracking.git import git_state
from megaseq.train.validation import Validation


class Trainer:
    """Trains a run in its directory; made anew in the same directory, it goes on from the newest checkpoint."""

    def __init__(
        self,
        params: Run.Params,
        *,
        run_dir: Path | str,
        allow_changed_params: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Checks everything that can be checked before a model is built; all ranks of the run do so together.

        Args:
            params: complete; a copy is kept.
            run_dir: made where it does not exist.
            allow_changed_params: go on with a run that was begun with other params.
            callbacks: further listeners, after the trackers of the params; like these, rank 0 has them.

        Raises:
            ParamsError: the params have problems, ask for a GPU that is not there or a layout that does not work.
            TrainingError: the directory holds something else.
        """
        parts.check_params(params)
        self.team = current_team()
        self._device, self.mesh = begin(params, team=self.team)
        self.params = params.copy().freeze()
        self.run_dir = RunDirectory(run_dir)
        self.changes: list[str] = []
        trackers: list[Callback] = []
        if self.team.is_first:
            # The others write nothing and tell nothing.
            self.changes = self.run_dir.prepare(self.params, allow_changed_params=allow_changed_params)
            trackers = [*self.params.tracking.instantiate().callbacks(run_dir=self.run_dir.path), *callbacks]
        self.team.meet("run directory")
        self._program: Program = self.params.train.instantiate()
        self._callback = Callbacks(trackers)
        self._early_stop: EarlyStop = self.params.train.early_stop.instantiate()
        self._meter = Meter()
        self._signals = StopSignals()
        self._agreement = Agreement(self.team, signals=self._signals, time_is_up=self._time_is_up)
        self._worker: Worker | None = None
        self._in_set_up = True
        """Whether there is nothing yet that a signal would lose."""
        self._step = 0
        self._pending: dict[str, float] | None = None
        self._kernels_said = False
        """Not None: what is due after the step was interrupted; the figures that were there already."""
        self._begun = time.monotonic()

    def fit(self) -> str:
        """Trains to the end; returns `finished`, or `stopped` after a signal, the state saved either way.

        Raises:
            MegaseqError: the data, the checkpoint or the training itself does not allow to go on.
        """
        parts.set_up_process(self.params)
        status = "failed"
        with contextlib.ExitStack() as stack:
            # Last first. Each is done whatever becomes of the others.
            stack.enter_context(self._signals)
            stack.callback(self.run_dir.unlock)
            stack.callback(lambda: self._leave_workers(finished=status == "finished"))
            stack.callback(lambda: self._callback.on_finish(status=status))
            stack.push(lambda kind, error, trace: self._write_status(status, failed=kind is not None))
            try:
                status = self._run()
            except EndedElsewhereError as ended:
                status = "failed" if ended.code else "stopped"
                raise
        return status

    def _run(self) -> str:
        try:
            self._signals.raises = True
            self._set_up()
            return self._finish_or_resume()
        except (Interrupted, MegaseqError):
            # A library that calls back into Python may have turned the interruption into an error of its own.
            if not self._in_set_up or not self._signals.requested:
                raise
            text = f"{self._signals.requested}: nothing to save yet, the same command begins again"
            if self.team.world_size > 1:
                if self.team.end(code=0, text=text):
                    print(text, file=sys.stderr)
                raise EndedElsewhereError(0) from None
            self._callback.on_message(text)
            return "stopped"
        finally:
            self._signals.raises = False

    def _leave_workers(self, *, finished: bool) -> None:
        if self._worker is not None:
            self._worker.leave(finished=finished)

    def _write_status(self, status: str, *, failed: bool) -> None:
        """Records how the run has ended; where it has failed, that error is told, not one of this file."""
        if not self.team.is_first:
            return
        try:
            self.run_dir.write_status(step=self._step, status=status)
        except OSError as error:
            if not failed:
                raise
            self._callback.on_message(f"{self.run_dir.path}: the status could not be written: {error}")

    # ---- building ------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        p = self.params
        cache = parts.cache_dir(p, run_dir=self.run_dir.path)
        spread = Spread(mesh=self.mesh, team=self.team, device=self._device)
        with self.team.watchdog.paused("reading the data"):
            self.vocabulary = self._open_vocabulary(cache)
            self.data: Input = parts.train_input(
                p,
                vocabulary=self.vocabulary,
                cache=cache,
                data_rank=max(p.train.local_sgd.worker, 0) * spread.data_ranks + spread.data_rank,
                data_ranks=max(p.train.local_sgd.workers, 1) * spread.data_ranks,
            )
        self.team.meet("training data")
        self.team.watchdog.beat(doing="building the model")
        self.engine = Engine(
            parts.task_params(p, vocabulary=self.vocabulary),
            learner_params=p.learner,
            seed=p.seed,
            precision=p.train.precision,
            accumulation=p.train.accumulation,
            device=self._device,
            mesh=self.mesh if self.team.world_size > 1 else None,
            parallel=p.parallel,
            activation_checkpointing=p.train.activation_checkpointing,
            compiled=p.train.compile,
        )
        self._worker = Worker.of(p.train.local_sgd, engine=self.engine, team=self.team)
        if self.team.is_first:
            write_atomically(self.run_dir.parameters_txt, f"{self.engine.learner.listing()}\n")
        self._saver = Saver(p, run_dir=self.run_dir, vocabulary=self.vocabulary, engine=self.engine)
        self._validation = Validation(
            params=p,
            vocabulary=self.vocabulary,
            cache=cache,
            run_dir=self.run_dir if self.team.is_first else None,
            callback=self._callback,
            keep_going=self._agreement.keep_going,
            to_device=self.engine.to_local,
            spread=spread,
        )
        program = p.train
        if program.eval_at_end or program.eval_interval_steps or program.decode_at_end or program.decode_interval_steps:
            # A bad line in evaluation data is to be known now and not after the training.
            with self.team.watchdog.paused("reading the evaluation data"):
                self._validation.open()
            self.team.meet("evaluation data")

    def _open_vocabulary(self, cache: Path) -> Vocabulary:
        """Makes the vocabulary on rank 0, however long that takes, and gives it to the others."""
        own = self._make_vocabulary(cache) if self.team.is_first else None
        if self.team.world_size == 1 and own is not None:
            return own
        self.team.meet("vocabulary")
        files = {} if own is None else {name: data.decode("latin-1") for name, data in own.save_files().items()}
        files = {name: text.encode("latin-1") for name, text in self.team.share(files).items()}
        return own or self.params.vocabulary.instantiate(files=files)

    def _make_vocabulary(self, cache: Path) -> Vocabulary:
        """Restores the vocabulary of the run, or builds it and keeps its files in the run directory."""
        directory = self.run_dir.vocabulary
        if directory.is_dir():
            return parts.read_vocabulary(self.params, directory=directory)
        vocabulary: Vocabulary = self.params.vocabulary.instantiate(
            learn_from=self.params.train_input.source, cache_dir=cache
        )
        # Renamed when whole: a signal, or a kill, must not leave a directory with one of two tokenizers.
        unfinished = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, data in vocabulary.save_files().items():
            write_atomically(unfinished / name, data)
        unfinished.rename(directory)
        return vocabulary

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _finish_or_resume(self) -> str:
        self.team.watchdog.beat(doing="restoring")
        position = self._saver.restore(message=self._callback.on_message)
        loaded = ""
        if position is not None:
            self._take(position)
        elif self.params.init_from is not None:
            loaded = self.engine.warm_start(self.params.init_from.instantiate()).summary()
        if self._pending is None and (ended := self._already_ended()):
            self._callback.on_message(f"{self.run_dir.path}: already trained to step {self._step}: {ended}")
            return "finished"
        self._announce(resumed=position is not None)
        if loaded:
            self._callback.on_message(f"begins with {loaded}")
        if self._worker is not None:
            self._worker.join()
        if self._pending is not None:
            self._end_set_up()
        if self._pending is not None and self._after_step(reason=self._reason_to_end(), resumed=True):
            status = "finished"
        else:
            status = self._train()
        self._saver.wait()
        return status

    def _end_set_up(self) -> None:
        """From here on a signal only asks the loop to end: there is something to save."""
        self._signals.raises = self._in_set_up = False

    def _already_ended(self) -> str:
        """Returns why a run that is gone on with has nothing left to do, and what to do about it."""
        max_steps = self.params.train.max_steps
        if self._step >= max_steps:
            return (
                f"train.max_steps={max_steps}. Raise it, with --allow-changed-params, to train on, or choose "
                "another --run-dir."
            )
        if reason := self._early_stop.reason_to_stop(step=self._step):
            return f"{reason}. Change train.early_stop, with --allow-changed-params, to train on."
        return ""

    def _take(self, position: Position) -> None:
        self._step = position.step
        self.data.load_state_dict(position.data)
        self._meter.load_state_dict(position.meter)
        self._early_stop.load_state_dict(position.early_stop)
        self._pending = None if position.pending is None else dict(position.pending)

    def _announce(self, *, resumed: bool) -> None:
        p = self.params
        facts = RunFacts(
            name=p.name,
            run_dir=self.run_dir.path,
            params={path: value for path, value in p.leaves()},
            first_step=self._step,
            max_steps=p.train.max_steps,
            git=git_state(),
        )
        self._callback.on_start(facts)
        if self.team.is_first:
            self.run_dir.write_status(step=self._step, status="running")
        for line in placement(self.mesh, team=self.team, device=self._device, task=self.engine.task):
            self._callback.on_message(line)
        for line in self.engine.pipeline.plan.lines() if self.engine.pipeline is not None else ():
            self._callback.on_message(f"  {line}")
        if self.team.is_first and self.team.world_size > 1:
            from megaseq.train.planning.at_start import memory_lines

            for line in memory_lines(p, layout=self.mesh.layout, precision=self.engine.precision):
                self._callback.on_message(line)
        begin = f"goes on from step {self._step}" if resumed else "begins"
        self._callback.on_message(
            f"{p.name} {begin} in {self.run_dir.path}: {self.engine.num_parameters / 1e6:.1f} M parameters, "
            f"{self.engine.precision} on {device_name(self.engine.device)}, "
            f"vocabulary of {self.vocabulary.source.vocab_size}/{self.vocabulary.target.vocab_size} tokens"
        )
        learner = p.learner
        if learner.rules or learner.freeze_patterns or learner.train_only_patterns:
            self._callback.on_message(f"what each pattern of the learner matches: {self.run_dir.parameters_txt}")
        for line in self.changes:
            self._callback.on_message(f"changed: {line}")

    def _train(self) -> str:
        batches = iter(self.data)
        if self._in_set_up:
            first = next(batches)  # With it the caches are there.
            batches = itertools.chain([first], batches)
            self._end_set_up()
        while not self._agreement.signal:
            self.team.watchdog.beat(step=self._step, doing="training step")
            begin = time.perf_counter()
            batch: NestedMap = next(batches)
            fetched = time.perf_counter()
            self._agreement.begin_step(cells(batch))
            result = self.engine.train_step(batch, step=self._step)
            self._step += 1
            self.team.watchdog.beat(step=self._step, doing="deciding whether to go on")
            time_is_up, counts = self._agreement.end_step()
            self._meter.add(result, cells=counts, seconds=time.perf_counter() - begin, wait_seconds=fetched - begin)
            if result.skipped:
                self._callback.on_message(
                    f"step {self._step}: skipped, its gradient norm {result.grad_norm:g} is {result.skipped}"
                )
            self._callback.on_progress(step=self._step)
            self._say_kernels()
            self.team.watchdog.beat(doing="after the step")
            reason = self._reason_to_end(time_is_up=time_is_up)
            if self._worker is not None:
                self._worker.after_step(last=bool(reason))
            if reason or self._step % self.params.train.log_interval_steps == 0:
                self._log(learning_rate=result.learning_rate)
            self._pending = {}
            if self._after_step(reason=reason):
                return "finished"
        if self._pending is not None or not self._saver.saved(step=self._step):
            self._save(metrics=self._pending or {})
        self._callback.on_message(f"{self._agreement.signal}: saved at step {self._step}, the same command goes on")
        return "stopped"

    def _say_kernels(self) -> None:
        """Says after the first step of this process which implementations `auto` took for it."""
        if not self._kernels_said:
            self._kernels_said = True
            chosen = (f"{op} {'/'.join(names)}" for op, names in automatic_choices().items())
            self._callback.on_message(f"kernels: {', '.join(chosen) or 'as MEGASEQ_KERNELS says'}")

    def _after_step(self, *, reason: str, resumed: bool = False) -> bool:
        """Evaluates, decodes and saves what is due after the step; returns whether the run has ended.

        A signal leaves the rest of it pending: the checkpoint says so, and the run that goes on from it begins here.

        Args:
            reason: why this step was the last one; empty if it was not.
            resumed: whether an earlier process was interrupted here.
        """
        step = self._step
        figures = self._pending = self._validate(at_end=bool(reason), before=self._pending or {})
        if self._agreement.signal:
            return False
        self._early_stop.observe(figures, step=step)
        reason = reason or self._early_stop.reason_to_stop(step=step)
        self._pending = None
        # The checkpoint of a process that was interrupted here still says that this is to be done.
        if reason or self._saver.due(step=step) or (resumed and figures):
            self._save(metrics=figures)
        if reason:
            self._callback.on_message(f"finished at step {step}: {reason}")
        return bool(reason)

    def _time_is_up(self) -> bool:
        limit = self.params.train.max_minutes
        return limit > 0 and time.monotonic() - self._begun >= 60 * limit

    def _reason_to_end(self, *, time_is_up: bool = False) -> str:
        p = self.params.train
        if self._step >= p.max_steps:
            return f"train.max_steps is {p.max_steps}"
        if time_is_up:
            return f"train.max_minutes is {p.max_minutes:g}"
        return ""

    def _log(self, *, learning_rate: float) -> None:
        figures = self._meter.read(device=self.engine.device) | {
            "train/learning_rate": learning_rate,
            "train/skipped_steps": float(self.engine.learner.num_skipped),
        }
        if self._worker is not None:
            figures |= self._worker.figures()
        self._callback.on_metrics(figures, step=self._step)

    def _validate(self, *, at_end: bool, before: Mapping[str, float]) -> dict[str, float]:
        """Returns the figures of what is due: those that were there `before`, and the missing ones."""
        p, step = self.params.train, self._step
        figures = dict(before)
        if not self.params.eval_inputs:
            return figures
        evaluates = self._program.eval_due(step) or (at_end and p.eval_at_end)
        decodes = self._program.decode_due(step) or (at_end and p.decode_at_end)
        evaluates = evaluates and not any(name.startswith("eval/") for name in before)
        decodes = decodes and not any(name.startswith("decode/") for name in before)
        if not (evaluates or decodes):
            return figures
        self.team.watchdog.beat(doing="evaluating")
        with self.engine.evaluating() as task:
            if evaluates:
                figures |= self._validation.evaluate(task, step=step)
            if decodes and not self._agreement.signal:
                limit = 0 if at_end else p.decode_max_examples
                figures |= self._validation.decode(task, step=step, max_examples=limit)
        return figures

    def _save(self, *, metrics: dict[str, float]) -> None:
        self.team.watchdog.beat(doing="saving")
        self._saver.save(
            Position(
                step=self._step,
                data=self.data.state_dict(),
                meter=self._meter.state_dict(),
                early_stop=self._early_stop.state_dict(),
                pending=self._pending,
            ),
            metrics=metrics,
        )
        if self.team.is_first:
            self.run_dir.write_status(step=self._step, status="running")
