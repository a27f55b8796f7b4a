"""What is planned: a run's model, batch and learner as numbers, read from its params alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megaseq.base import FROM_PARENT
from megaseq.base.errors import AsText, must
from megaseq.data.packing import Packing
from megaseq.layers.attention import Attention
from megaseq.layers.transformer import Stack
from megaseq.parallel.refusals import ModelFacts
from megaseq.parallel.spec import ParameterSpec
from megaseq.tasks.base import BaseTask
from megaseq.train.activation_checkpointing import ActivationCheckpointing, Mode
from megaseq.train.experiment import Run
from megaseq.train.model_facts import model_facts
from megaseq.train.planning.memory import MemoryModel, Numbers, Weight
from megaseq.train.planning.trace import ModelTrace, Shape, UnitTrace, meta_task, units_of
from megaseq.train.precision import low_precision_parameters

SAMPLED_ROWS = (1, 8, 64)
"""Rows of the micro-batches that are traced; what others keep is estimated from these."""


def sized_task(params: Run.Params) -> BaseTask.Params:
    """Returns the task's params with the sizes of the vocabularies that the tokenizers' params ask for.

    Raises:
        ParamsError: the tokenizer learns its size from the data.
    """
    task = params.task.copy()
    target = params.vocabulary.target or params.vocabulary.source
    for name, tokenizer in (("source_vocab_size", params.vocabulary.source), ("target_vocab_size", target)):
        if name not in task or task.get(name) is not FROM_PARENT:
            continue
        asked = {"Bytes": 259 + len(tokenizer.tags)}.get(type(tokenizer).cls.__name__)
        size = getattr(tokenizer, "vocab_size", asked)
        if not isinstance(size, int):
            raise must(f"task.{name}", "be known before the data is read", AsText("not"), f"Give task.{name}=NUMBER")
        task.set(name, size, origin="the tokenizer's params")
    return task


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step's global batch."""

    rows: int
    source_length: int
    target_length: int


class Subject:
    """A run's model and batch, with everything about them that estimates need."""

    def __init__(self, params: Run.Params, *, precision: str) -> None:
        """Builds the model without values.

        Args:
            params: of the run.
            precision: fp32, bf16 or bf16_autocast.

        Raises:
            ParamsError: batches have no fixed shape, or the task is not made of units.
        """
        self.params = params
        self.precision = precision
        self.task = sized_task(params)
        self.batch = _batch(params)
        built = meta_task(self.task)
        self.units = units_of(built)
        low = low_precision_parameters(built)
        self.weights = {name: _weight(value, low=name in low) for name, value in built.named_parameters()}
        self.facts: ModelFacts = dataclasses.replace(model_facts(params), num_units=len(self.units))
        self.attention_width = _attention_width(self.task)
        width = self.units[-1].leaves[-1].width
        self.memory = MemoryModel(
            weights=self.weights,
            numbers=Numbers(precision=precision, state=_state_bytes(params)),
            vocab_size=self.task.get("target_vocab_size"),
            width=width,
        )

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model, shared ones once."""
        return sum(weight.elements for weight in self.weights.values())

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one subject a process
    def traces(self, *, tensor: int, mode: Mode, shape: Shape) -> dict[str, UnitTrace]:
        """Returns what each unit keeps of a micro-batch of exactly this shape, on one of `tensor` ranks."""
        return self._model(tensor, mode).run(shape)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def estimated_traces(self, *, tensor: int, mode: Mode, shape: Shape) -> dict[str, UnitTrace]:
        """Returns what `traces` does, between traces of a few numbers of whole rows.

        All that a unit keeps grows with the tokens, whether rows are more or longer, unless attention weights are
        kept: then every shape is traced.
        """
        batch = self.batch
        rows = shape.rows * shape.source_length / max(1, batch.source_length)
        if self.keeps_attention_weights or not 0.05 < rows < SAMPLED_ROWS[-1] * 16:
            return self.traces(tensor=tensor, mode=mode, shape=shape)
        above = next((n for n in SAMPLED_ROWS[1:] if n >= rows), SAMPLED_ROWS[-1])
        below = SAMPLED_ROWS[SAMPLED_ROWS.index(above) - 1]
        low, high = (
            self.traces(tensor=tensor, mode=mode, shape=Shape(n, batch.source_length, batch.target_length))
            for n in (below, above)
        )
        share = (rows - below) / (above - below)
        return {name: _between(low[name], high[name], share=share) for name in low}

    @property
    def keeps_attention_weights(self) -> bool:
        """Whether some attention is not computed by a fused op, in training."""
        stacks = [stack.attention_dropout for _, stack in self.task.find(Stack)]
        return any(stacks) or any(attention.soft_cap is not None for _, attention in self.task.find(Attention))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _model(self, tensor: int, mode: Mode) -> ModelTrace:
        own = self.params.train.activation_checkpointing
        checkpointing = own if mode == own.mode and own.rules else ActivationCheckpointing.Params(mode=mode)
        return ModelTrace(self.task, tensor=tensor, precision=self.precision, checkpointing=checkpointing)


def _between(low: UnitTrace, high: UnitTrace, *, share: float) -> UnitTrace:
    """Returns the trace at a share of the way from one to the other; a share may lie outside of 0 to 1."""
    one, other = dataclasses.astuple(low), dataclasses.astuple(high)
    return UnitTrace(*(max(0, round(a + share * (b - a))) for a, b in zip(one, other, strict=True)))


def _batch(params: Run.Params) -> Batch:
    batching: Any = params.train_input.batching
    if not isinstance(batching, Packing.Params):
        raise must(
            "train_input.batching",
            "have one shape for all batches",
            type(batching).cls.__name__,
            "Plan with train_input.batching.cls=megaseq.data.packing.Packing and its rows and source_length",
        )
    return Batch(batching.rows, batching.source_length, batching.target_length or batching.source_length)


def _weight(parameter: torch.Tensor, *, low: bool) -> Weight:
    spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
    return Weight(elements=parameter.numel(), axes=spec.axes, low=low)


def _state_bytes(params: Run.Params) -> float:
    """Returns the bytes that the learner keeps for each element of a matrix, by making one."""
    probe = torch.nn.Parameter(torch.zeros(256, 256))
    plain = params.learner.replace(rules=(), freeze_patterns=(), train_only_patterns=())
    learner = plain.instantiate(named_parameters={"task.probe": probe})
    kept = sum(tensor.numel() * tensor.element_size() for tensor in learner.state_tensors().values())
    return float(kept / probe.numel())


def _attention_width(task: BaseTask.Params) -> int:
    """Returns the largest width of all heads together."""
    widths = [0]
    for _, attention in task.find(Attention):
        head = attention.head_dim or 0
        widths.append(head * attention.num_heads)
    return max(widths) or int(task.get("model_dim"))
