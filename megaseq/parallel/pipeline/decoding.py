"""Token-by-token decoding through a pipeline.

Every rank of the pipeline runs the same search on the same logits, which the last stage sends to all of them after
each step; where the search reads the best few alone, these are all that is sent. So all ranks take the same decisions:
a source that has ended leaves the batch on all of them at once, and none ever waits for one that has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.parallel.pipeline.links import Links, in_order
from megaseq.parallel.spec import Pipelined


class Part(Protocol):
    """What one stage does of a step; see `megaseq.layers.decoding_part`."""

    begins: bool
    """Whether it reads tokens."""
    ends: bool
    """Whether it gives logits."""
    has_last_layer: bool
    """Whether it knows the attention that a step reports."""

    @property
    def width(self) -> int:
        """Width of hidden states."""

    def prefill(self, memory: NestedMap) -> NestedMap:
        """Returns its state before the first step."""

    def step(self, state: NestedMap, *, x: Tensor, need_attention: bool = False) -> tuple[Tensor, NestedMap]:
        """Maps tokens or hidden states to hidden states or logits."""

    def select(self, state: NestedMap, *, sources: Tensor, hyps: Tensor) -> NestedMap:
        """Keeps some sources and hypotheses."""


class PipelinedDecoder:
    """A `StepDecoder` whose layers lie on several ranks, all of which call it at the same time."""

    def __init__(
        self,
        model: Pipelined,
        *,
        parts: Mapping[int, Part],
        links: Links,
        width: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Takes what this rank has.

        Args:
            model: with the tensors of this rank's stages.
            parts: by index, of this rank's stages that have units of the decoder.
            links: to the other stages.
            width: of the decoder's hidden states.
            vocab_size: V, of the logits.
            dtype: of activations between stages.
        """
        self._model = model
        self._parts = dict(parts)
        self._links = links
        self._width, self._dtype = width, dtype
        self.vocab_size = vocab_size
        stages = links.plan.stages
        of_target = [s.index for s in stages if any(f.side == "target" for unit in s.units for f in unit.leaves)]
        of_source = [s.index for s in stages if any(_is_source(unit) for unit in s.units)]
        self._decoder_stages, self._encoder_stages = of_target, of_source
        readers = [s.index for s in stages if any(".layers." in u.name and not _is_source(u) for u in s.units)]
        self._attention_stage = readers[-1] if readers else of_target[-1]

    @torch.no_grad()
    def prefill(self, source: NestedMap) -> NestedMap:
        """Encodes sources stage by stage; every rank gets the encoder's output."""
        batch = NestedMap(source=source)
        shapes = self._model.flow_shapes(batch)
        carry: dict[str, Tensor] = {}
        last = self._encoder_stages[-1]
        for index in self._encoder_stages:
            if not self._links.is_here(index):
                continue
            stage = self._links.plan.stages[index]
            units = [unit for unit in stage.units if _is_source(unit)]
            if index and not self._links.is_here(index - 1):
                received = self._links.receive(stage.enters, shapes=shapes, dtype=self._dtype, stage=index - 1)
                carry = dict(zip((flow.name for flow in stage.enters), received, strict=True))
            carry = self._model.run_units(carry, batch=batch, units=units)
            if index != last and not self._links.is_here(index + 1):
                self._links.send(in_order(carry, flows=stage.leaves, dtype=self._dtype), stage=index + 1)
        memory = self._of_stage(last, lambda: carry["memory"], shape=(*shapes["memory"], self._memory_width()))
        self._links.wait()
        states = {
            index: part.prefill(NestedMap(states=memory, segment_ids=source.get("segment_ids")))
            for index, part in self._parts.items()
        }
        return NestedMap(
            states=tuple(states.values()),
            num_rows=source.ids.shape[0],
            source_length=source.ids.shape[1],
            attention_probs=None,
        )

    def _memory_width(self) -> int:
        flows = self._links.plan.stages[self._encoder_stages[-1]]
        return next(flow.width for unit in flows.units for flow in unit.leaves if flow.name == "memory")

    def _of_stage(self, stage: int, tensor: Any, *, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Returns on all ranks what `tensor()` is on the rank of `stage`."""
        own: Tensor | None = tensor() if self._links.is_here(stage) else None
        return self._links.from_stage(own, shape=shape, dtype=dtype or self._dtype, stage=stage)

    @torch.no_grad()
    def step(self, state: NestedMap, *, tokens: Tensor, need_attention: bool = False) -> tuple[Tensor, NestedMap]:
        """Feeds the last token of each hypothesis; see `StepDecoder.step`."""
        rows, last = tokens.shape[0], self._decoder_stages[-1]
        x, states = self._run(state, tokens=tokens, need_attention=need_attention)
        logits = self._of_stage(last, lambda: x, shape=(rows, self.vocab_size), dtype=torch.float32)
        attention: Tensor | None = None
        if need_attention:
            attention = self._of_stage(
                self._attention_stage,
                lambda: states[self._attention_stage].attention_probs,
                shape=(rows, state.source_length),
                dtype=torch.float32,
            )
        self._links.wait()
        return logits, NestedMap({**state, "states": tuple(states.values()), "attention_probs": attention})

    @torch.no_grad()
    def step_best(
        self,
        state: NestedMap,
        *,
        tokens: Tensor,
        best: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        count: int,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], NestedMap]:
        """Does a step; returns on all ranks what `best` makes of the logits. See `megaseq.decode.protocol.StepBest`."""
        rows, last, count = tokens.shape[0], self._decoder_stages[-1], min(count, self.vocab_size)
        x, states = self._run(state, tokens=tokens, need_attention=False)

        def packed() -> Tensor:
            # In one message: ids travel as the bits of numbers, which nothing on the way looks at.
            values, ids, column = best(x.float())
            return torch.cat([values, column.unsqueeze(1), ids.int().view(torch.float32)], dim=1)

        sent = self._of_stage(last, packed, shape=(rows, 2 * count + 1), dtype=torch.float32)
        self._links.wait()
        ids = sent[:, count + 1 :].contiguous().view(torch.int32).long()
        after = NestedMap({**state, "states": tuple(states.values()), "attention_probs": None})
        return (sent[:, :count], ids, sent[:, count]), after

    def _run(self, state: NestedMap, *, tokens: Tensor, need_attention: bool) -> tuple[Tensor, dict[int, NestedMap]]:
        """Runs this rank's stages; returns what the last of them gave, and the new states by stage."""
        states = dict(zip(self._parts, state.states, strict=True))
        x, last = tokens, self._decoder_stages[-1]
        for index in self._decoder_stages:
            if not self._links.is_here(index):
                continue
            part = self._parts[index]
            if not part.begins and not self._links.is_here(index - 1):
                x = self._links.receive_tensor((tokens.shape[0], self._width), dtype=self._dtype, stage=index - 1)
            x, states[index] = part.step(states[index], x=x, need_attention=need_attention)
            if index != last and not self._links.is_here(index + 1):
                self._links.send((x.to(self._dtype).contiguous(),), stage=index + 1)
        return x, states

    @torch.no_grad()
    def select(self, state: NestedMap, *, sources: Tensor, hyps: Tensor) -> NestedMap:
        """Keeps `sources` and, of each, the hypotheses `hyps`; see `StepDecoder.select`."""
        states = tuple(
            part.select(own, sources=sources, hyps=hyps)
            for part, own in zip(self._parts.values(), state.states, strict=True)
        )
        return NestedMap({**state, "states": states})

    def reorder(self, state: NestedMap, *, hyps: Tensor) -> NestedMap:
        """Keeps all sources and, of each, the hypotheses `hyps`; the model's own knows nothing of stages."""
        return self.select(state, sources=torch.arange(hyps.shape[0], device=hyps.device), hyps=hyps)


def _is_source(unit: Any) -> bool:
    """Whether a unit works on the source alone."""
    return all(flow.side == "source" for flow in unit.leaves)
