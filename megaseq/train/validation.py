"""Evaluates and decodes the evaluation inputs at one step of a run; what the trainer, evaler and decoder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megaseq.base import Configurable, NestedMap
from megaseq.data.input import Input
from megaseq.data.vocabulary import Vocabulary
from megaseq.tasks.base import BaseTask
from megaseq.tasks.scoring import Score
from megaseq.train import parts
from megaseq.train.decoding import DecodedSet, decode_set, write_decodes
from megaseq.train.evaluation import evaluate
from megaseq.train.experiment import Run
from megaseq.train.run_dir import RunDirectory
from megaseq.train.spread import ALONE, Spread
from megaseq.train.tracking import Callback, Sample


def _unmoved(batch: NestedMap) -> NestedMap:
    return batch


@dataclasses.dataclass
class Validation:
    """The evaluation inputs of a run, opened once, and where their figures go."""

    params: Run.Params
    vocabulary: Vocabulary
    cache: Path
    run_dir: RunDirectory | None
    """Where hypotheses are written; None: nowhere."""
    callback: Callback
    keep_going: Callable[[], bool] = lambda: True
    """Asked between batches; on False what runs is given up without a figure."""
    to_device: Callable[[NestedMap], NestedMap] = _unmoved
    spread: Spread = ALONE
    """How ranks share the work; figures are the same on all of them."""
    last_scores: dict[str, dict[str, Score]] = dataclasses.field(default_factory=dict)
    """Scores, with signatures, of what was decoded last, by input."""
    _inputs: dict[str, Input] = dataclasses.field(default_factory=dict)
    _texts: dict[tuple[str, int], tuple[list[str], list[str]]] = dataclasses.field(default_factory=dict)

    def open(self) -> None:
        """Reads the evaluation inputs, and tokenizes what is not cached yet.

        Raises:
            DataError: one of them has a bad line or is not there.
        """
        if self._inputs:
            return
        program = self.params.train
        both = program.eval_names and program.decode_names
        names = tuple(dict.fromkeys((*program.eval_names, *program.decode_names))) if both else ()
        self._inputs = parts.eval_inputs(
            self.params,
            names=names,
            vocabulary=self.vocabulary,
            cache=self.cache,
            data_rank=self.spread.data_rank,
            data_ranks=self.spread.data_ranks,
        )

    def evaluate(self, task: BaseTask, *, step: int) -> dict[str, float]:
        """Returns, and tells the trackers, `eval/NAME/loss` and the other means of every evaluation input.

        Args:
            task: in evaluation mode.
            step: optimiser steps that its weights have seen.
        """
        self.open()
        figures: dict[str, float] = {}
        for name in self.params.train.eval_names or tuple(self._inputs):
            data = self._inputs[name]
            means = evaluate(
                task,
                batches=data.epoch_batches(),
                to_device=self.to_device,
                keep_going=self.keep_going,
                spread=self.spread,
            )
            figures |= {f"eval/{name}/{key}": value for key, value in means.items()}
        if figures and self.keep_going():
            self.callback.on_metrics(figures, step=step)
            return figures
        return {}

    def decode(
        self, task: BaseTask, *, step: int, search: Configurable.Params | None = None, max_examples: int = 0
    ) -> dict[str, float]:
        """Decodes every input, writes the hypotheses, and returns and tells `decode/NAME/bleu` and the other scores.

        Args:
            task: in evaluation mode.
            step: optimiser steps that its weights have seen.
            search: params of the search; None: the task's own.
            max_examples: examples of each input, the first ones; 0: all.
        """
        figures: dict[str, float] = {}
        self.last_scores = {}
        for name, _ in parts.chosen_inputs(self.params, names=self.params.train.decode_names):
            decoded = self.decode_input(task, name=name, search=search, max_examples=max_examples)
            if not decoded.scores:
                return {}
            self.last_scores[name] = decoded.scores
            figures |= {f"decode/{name}/{key}": score.value for key, score in decoded.scores.items()}
            if self.run_dir is not None:
                write_decodes(decoded, directory=self.run_dir.decodes(step=step), name=name)
            samples = spread_samples(decoded, count=self.params.train.num_samples)
            if samples:
                self.callback.on_samples(samples, step=step, name=name)
        if figures:
            self.callback.on_metrics(figures, step=step)
        return figures

    def decode_input(
        self, task: BaseTask, *, name: str, search: Configurable.Params | None = None, max_examples: int = 0
    ) -> DecodedSet:
        """Decodes and scores one evaluation input."""
        key = (name, max_examples)
        if key not in self._texts:
            self._texts[key] = parts.all_texts(self.params.eval_inputs[name], limit=max_examples)
        sources, references = self._texts[key]
        return decode_set(
            task,
            sources=sources,
            references=references,
            vocabulary=self.vocabulary,
            search=search or task.default_search(),
            keep_going=self.keep_going,
            spread=self.spread,
        )


def spread_samples(decoded: DecodedSet, *, count: int) -> list[Sample]:
    """Returns `count` examples, evenly spread over the data set."""
    total = len(decoded.sources)
    count = min(count, total)
    rows = [index * total // count for index in range(count)]
    outputs = decoded.outputs
    return [Sample(source=decoded.sources[i], output=outputs[i], reference=decoded.references[i]) for i in rows]
