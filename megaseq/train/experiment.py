"""An experiment: the class a person writes, and the params of the run that it describes."""

from __future__ import annotations

from collections.abc import Iterator

from megaseq.base import REQUIRED, Configurable, Problem, registry
from megaseq.checkpoint import Checkpointer, WarmStart
from megaseq.data.input import Input
from megaseq.data.vocabulary import Vocabulary
from megaseq.learner import Learner
from megaseq.parallel.layout import Parallel
from megaseq.tasks.base import BaseTask
from megaseq.train.program import Program
from megaseq.train.tracking import Tracking


class Run(Configurable):
    """Everything that a training run is made of; only its params are used, the jobs build the parts."""

    class Params(Configurable.Params):
        name: str = REQUIRED
        """Registered name of the experiment."""
        seed: int = 1
        """Seeds initial weights, dropout and, where the training input sets no seed, the order of examples."""
        vocabulary: Vocabulary.Params = REQUIRED
        """The tokenizers of source and target."""
        task: BaseTask.Params = REQUIRED
        """The model and its loss."""
        train_input: Input.Params = REQUIRED
        """What is trained on."""
        eval_inputs: dict[str, Input.Params] = {}
        """What is evaluated and decoded, by name."""
        init_from: WarmStart.Params | None = None
        """Checkpoint whose parameters a new run begins with; a resumed run does not read it."""
        learner: Learner.Params = Learner.Params()
        """Optimizer, schedule, clipping, moving average."""
        train: Program.Params = REQUIRED
        """How long, how precise, and what runs between the steps."""
        parallel: Parallel.Params = Parallel.Params()
        """How the processes share the work; the result does not depend on it."""
        checkpoint: Checkpointer.Params = Checkpointer.Params()
        """When to save and what to keep."""
        tracking: Tracking.Params = Tracking.Params()
        """Where figures go."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports names of evaluation inputs that do not exist, and workers that would have parts of the model."""
            yield from super().validate()
            known = ", ".join(self.eval_inputs) or "none"
            for field, names in (
                ("eval_names", self.train.eval_names),
                ("decode_names", self.train.decode_names),
            ):
                for name in names:
                    if name not in self.eval_inputs:
                        yield f"train.{field}: must be among {known} of eval_inputs, but has {name!r}. Choose of them."
            for field, metric in (
                ("train.early_stop.metric", self.train.early_stop.metric),
                ("checkpoint.best_metric", self.checkpoint.best_metric),
            ):
                kind, _, rest = (metric or "").partition("/")
                if metric and (kind not in ("eval", "decode") or rest.partition("/")[0] not in self.eval_inputs):
                    yield (
                        f"{field}: must be eval/NAME/FIGURE or decode/NAME/SCORE with a NAME among {known}, but is "
                        f"{metric!r}. An example is eval/NAME/loss."
                    )
            for name, whole in (("tensor", 1), ("pipe", 1), ("expert", 1), ("zero.stage", 0)):
                if self.train.local_sgd.workers and self.parallel.get(name) > whole:
                    yield (
                        f"parallel.{name}: must be off with train.local_sgd, but is {self.parallel.get(name)}. "
                        f"Each rank of a worker has the whole model: set parallel.{name}={whole}, or "
                        "train.local_sgd.workers=0."
                    )

    params: Params


class Experiment:
    """Base of all experiments: subclass it, fill in the parts, and put `@register` above the class.

    A variant inherits and changes what differs:

        @register
        class Small(Base):
            def task(self) -> Translation.Params:
                p = super().task()
                p.decoder.num_layers = 3
                return p
    """

    def vocabulary(self) -> Vocabulary.Params:
        """The tokenizers of source and target."""
        raise NotImplementedError(f"{type(self).__qualname__} must define vocabulary()")

    def task(self) -> BaseTask.Params:
        """The model and its loss."""
        raise NotImplementedError(f"{type(self).__qualname__} must define task()")

    def train_input(self) -> Input.Params:
        """What is trained on."""
        raise NotImplementedError(f"{type(self).__qualname__} must define train_input()")

    def eval_inputs(self) -> dict[str, Input.Params]:
        """What is evaluated and decoded, by name."""
        return {}

    def init_from(self) -> WarmStart.Params | None:
        """The checkpoint whose parameters a new run begins with."""
        return None

    def learner(self) -> Learner.Params:
        """Optimizer, schedule, clipping, moving average."""
        return Learner.Params()

    def train(self) -> Program.Params:
        """How long, how precise, and what runs between the steps."""
        raise NotImplementedError(f"{type(self).__qualname__} must define train()")

    def parallel(self) -> Parallel.Params:
        """How the processes share the work."""
        return Parallel.Params()

    def checkpoint(self) -> Checkpointer.Params:
        """When to save and what to keep."""
        return Checkpointer.Params()

    def tracking(self) -> Tracking.Params:
        """Where figures go."""
        return Tracking.Params()

    def seed(self) -> int:
        """Seeds initial weights, dropout and, where the training input sets no seed, the order of examples."""
        return 1

    def params(self) -> Run.Params:
        """Returns the params of a run of this experiment, a fresh copy at every call."""
        return Run.Params(
            name=registry.key_of(type(self)),
            seed=self.seed(),
            vocabulary=self.vocabulary(),
            task=self.task(),
            train_input=self.train_input(),
            eval_inputs=self.eval_inputs(),
            init_from=self.init_from(),
            learner=self.learner(),
            train=self.train(),
            parallel=self.parallel(),
            checkpoint=self.checkpoint(),
            tracking=self.tracking(),
        )
