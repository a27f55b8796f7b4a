"""What of a run's params decides whether a layout works, read without building anything."""

from __future__ import annotations

from typing import Any

from megaseq.base.unset import Unset
from megaseq.data.packing import Packing
from megaseq.layers.attention import Attention
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.routing import Router
from megaseq.layers.transformer import Stack
from megaseq.parallel.refusals import ModelFacts
from megaseq.train.activation_checkpointing import layer_paths, mode_of
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
    routers = params.task.find(Router)
    batching: Any = params.train_input.batching
    packed = isinstance(batching, Packing.Params)
    hidden = {
        f"task.{path}": block.hidden_dim
        for path, block in (*params.task.find(FeedForward), *params.task.find(MixtureOfExperts))
        if not isinstance(block.hidden_dim, Unset)
    }
    stacks = [stack.num_layers for _, stack in params.task.find(Stack) if not isinstance(stack.num_layers, Unset)]
    return ModelFacts(
        num_heads=heads,
        hidden_dims=hidden,
        limited_experts=frozenset(f"task.{path}" for path, router in routers if router.capacity_factor is not None),
        # Two units more for each stack: what comes before its layers and after them.
        num_units=sum(stacks) + 2 * len(stacks),
        num_key_value_heads=key_heads,
        num_experts=experts,
        rows=batching.rows if packed else 0,
        source_length=batching.source_length if packed else 0,
        target_length=(batching.target_length or batching.source_length) if packed else 0,
        accumulation=params.train.accumulation,
        checkpointing=frozenset(
            mode_of(path, params=params.train.activation_checkpointing) for path in layer_paths(params.task)
        ),
        compiled=params.train.compile,
        precision=params.train.precision,
        optimizer=type(params.learner.optimizer).cls.__name__,
    )
