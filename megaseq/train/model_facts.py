"""What of a run's params decides whether a layout works, read without building anything."""

from __future__ import annotations

from typing import Any

from megaseq.base.unset import Unset
from megaseq.data.packing import Packing
from megaseq.layers.attention import Attention
from megaseq.layers.moe import MixtureOfExperts
from megaseq.parallel.refusals import ModelFacts
from megaseq.train.experiment import Run


def model_facts(params: Run.Params) -> ModelFacts:
    """Returns the facts of a run for `parallel.refusals.check_layout`; what waits for a vocabulary is left out."""
    heads: dict[str, int] = {}
    key_heads: dict[str, int] = {}
    for path, attention in params.task.find(Attention):
        if isinstance(attention.num_heads, Unset):
            continue
        heads[f"task.{path}"] = attention.num_heads
        key_heads[f"task.{path}"] = attention.num_key_value_heads or attention.num_heads
    experts = {
        f"task.{path}": mixture.num_experts
        for path, mixture in params.task.find(MixtureOfExperts)
        if not isinstance(mixture.num_experts, Unset)
    }
    batching: Any = params.train_input.batching
    packed = isinstance(batching, Packing.Params)
    return ModelFacts(
        num_heads=heads,
        num_key_value_heads=key_heads,
        num_experts=experts,
        rows=batching.rows if packed else 0,
        source_length=batching.source_length if packed else 0,
        target_length=(batching.target_length or batching.source_length) if packed else 0,
        accumulation=params.train.accumulation,
        precision=params.train.precision,
        optimizer=type(params.learner.optimizer).cls.__name__,
    )
