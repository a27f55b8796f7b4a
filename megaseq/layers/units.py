"""An encoder-decoder as a list of units, so that a pipeline can cut it between any two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaseq.base import NestedMap
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.sight import Mask, Sight
from megaseq.layers.tokens import Tokens
from megaseq.layers.transformer import Stack, TransformerLayer, memory_mask, positions_of
from megaseq.parallel.spec import Flow, Unit

if TYPE_CHECKING:
    from megaseq.layers.encoder_decoder import EncoderDecoder

OUTPUT = "hidden"
"""What the last unit leaves: the decoder's output [B, T, D]."""


def encoder_decoder_units(model: EncoderDecoder) -> tuple[Unit, ...]:
    """Returns the units: both embeddings, every layer, the end of both stacks; the softmax belongs to the last one."""
    encoder, decoder = model.encoder, model.decoder
    stream = Flow("encoder", "source", encoder.params.model_dim)
    memory = Flow("memory", "source", encoder.params.model_dim)
    target = Flow("decoder", "target", decoder.params.model_dim)
    embedding = "source_embedding" if model.target_embedding is None else "target_embedding"
    head = "head" if model.head is not None else embedding
    named = _Tensors(model)
    made = [named.unit("encoder.start", *_entrance("encoder"), "source_embedding", leaves=(stream,))]
    for index in range(len(encoder.layers)):
        name = f"encoder.layers.{index}"
        flops = named.flops(name)
        made.append(named.unit(name, name, "encoder.position_bias", source_flops=flops, leaves=(stream,)))
    made.append(named.unit("encoder.finish", "encoder.final_norm", leaves=(memory,)))
    readers = [i for i, layer in enumerate(decoder.layers) if _layer(layer).cross_attention is not None]
    last_reader = max(readers, default=-1)

    def leaves(index: int) -> tuple[Flow, ...]:
        return (memory, target) if index < last_reader else (target,)

    made.append(named.unit("decoder.start", *_entrance("decoder"), embedding, leaves=leaves(-1)))
    for index in range(len(decoder.layers)):
        name = f"decoder.layers.{index}"
        of_memory = named.flops(f"{name}.cross_attention.key_value")
        own = named.flops(name) - of_memory
        read = (name, "decoder.position_bias")
        made.append(named.unit(name, *read, source_flops=of_memory, target_flops=own, leaves=leaves(index)))
    output = Flow(OUTPUT, "target", decoder.params.model_dim)
    last = ("decoder.final_norm", head, "logits_bias")
    made.append(named.unit("decoder.finish", *last, target_flops=named.flops(head), leaves=(output,)))
    return tuple(made)


def flow_shapes(model: EncoderDecoder, *, batch: NestedMap) -> dict[str, tuple[int, int]]:
    """Returns (rows, tokens) of what this process has of each flow of `batch`, which may be a source alone."""
    shapes: dict[str, tuple[int, int]] = {}
    sides: tuple[tuple[str, Stack], ...] = (("source", model.encoder), ("target", model.decoder))
    for side, stack in sides:
        if side not in batch:
            continue
        ids = batch[side].ids
        rows, tokens = ids.shape
        name = "encoder" if side == "source" else "decoder"
        # The residual stream may be shared among tensor ranks; what a stack gives is not.
        divided = stack.ranks is not None and stack.stream(Tokens(length=tokens)).divided
        shapes[name] = (rows, tokens // stack.ranks.size if divided and stack.ranks is not None else tokens)
        shapes["memory" if side == "source" else OUTPUT] = (rows, tokens)
    return shapes


def _entrance(stack: str) -> tuple[str, ...]:
    """Returns what a stack reads before its first layer."""
    return f"{stack}.positions", f"{stack}.input_norm"


class _Tensors:
    """Parameters and buffers of a model by name."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._names = [*self._parameters, *dict(model.named_buffers())]
        # Of its experts a token goes through a few.
        self._used = {
            f"{path}.{name}": module.router.choices / module.params.num_experts
            for path, module in model.named_modules()
            if isinstance(module, MixtureOfExperts)
            for name in ("gate.weight", "up.weight", "down.weight")
        }

    def under(self, *prefixes: str) -> frozenset[str]:
        """Returns the names that are, or lie below, one of the prefixes."""
        return frozenset(n for n in self._names if any(n == p or n.startswith(f"{p}.") for p in prefixes))

    def flops(self, prefix: str) -> float:
        """Returns the operations a token of the products with the matrices below a prefix."""
        total = 0.0
        for name in self.under(prefix) & self._parameters.keys():
            # The shape in the whole model, whatever shard of it is here.
            shape: Sequence[int] = getattr(self._parameters[name], "spec", self._parameters[name]).shape
            if len(shape) > 1:
                total += 2.0 * math.prod(shape) * self._used.get(name, 1.0)
        return total

    def unit(
        self,
        name: str,
        *prefixes: str,
        leaves: tuple[Flow, ...],
        source_flops: float = 0.0,
        target_flops: float = 0.0,
    ) -> Unit:
        """Returns a unit that reads what lies below the prefixes."""
        return Unit(name, self.under(*prefixes), source_flops, target_flops, leaves)


class UnitRun:
    """Runs units on one micro-batch; what the layers of a stack share is made once."""

    def __init__(self, model: EncoderDecoder, *, batch: NestedMap) -> None:
        self._model = model
        self._batch = batch
        self._sights: dict[tuple[str, bool], Sight] = {}
        self._memory_mask: Mask | None = None
        self._has_mask = False

    def run(self, carry: Mapping[str, Tensor], *, unit: Unit) -> dict[str, Tensor]:
        """Runs one unit on what the unit before it left; returns what it leaves."""
        made = dict(carry)
        stack, _, place = unit.name.partition(".")
        if place == "start":
            made[stack] = self._start(stack, carry)
        elif unit.name == "encoder.finish":
            made["memory"] = self._model.encoder.finish(carry["encoder"], sight=self._sight("encoder", biased=False))
        elif unit.name == "decoder.finish":
            made[OUTPUT] = self._model.decoder.finish(carry["decoder"], sight=self._sight("decoder", biased=False))
        else:
            layer = self._stack(stack).layers[int(place.removeprefix("layers."))]
            if stack == "encoder":
                made[stack] = layer(carry[stack], sight=self._sight(stack, biased=True))
            else:
                made[stack] = layer(
                    carry[stack],
                    sight=self._sight(stack, biased=True),
                    memory=carry.get("memory"),
                    memory_mask=self._mask(),
                )
        return {flow.name: made[flow.name] for flow in unit.leaves}

    def _stack(self, name: str) -> Stack:
        return self._model.encoder if name == "encoder" else self._model.decoder

    def _start(self, stack: str, carry: Mapping[str, Tensor]) -> Tensor:
        side = self._side(stack)
        segment_ids, positions = places_of(side)
        embed = self._model.source_embedding if stack == "encoder" else self._model.embed_target
        x = self._stack(stack).enter(
            embed(side.ids), segment_ids=segment_ids, positions=positions, sight=self._sight(stack, biased=False)
        )
        return x if stack == "encoder" else _anchor(x, memory=carry["memory"])

    def _side(self, stack: str) -> NestedMap:
        side: NestedMap = self._batch.source if stack == "encoder" else self._batch.target
        return side

    def _sight(self, stack: str, *, biased: bool) -> Sight:
        """Returns what a stack's layers share; its ends do not read the bias, whose parameters they may lack."""
        if (stack, biased) not in self._sights:
            side = self._side(stack)
            segment_ids, positions = places_of(side)
            self._sights[stack, biased] = self._stack(stack).sight(
                segment_ids=segment_ids,
                positions=positions,
                row_segment_ids=side.get("row_segment_ids"),
                biased=biased,
            )
        return self._sights[stack, biased]

    def _mask(self) -> Mask | None:
        if not self._has_mask:
            source = self._batch.source
            self._memory_mask = memory_mask(
                self._sight("decoder", biased=True),
                memory_segment_ids=source.get("segment_ids"),
                memory_row_segment_ids=source.get("row_segment_ids"),
            )
            self._has_mask = True
        return self._memory_mask


class _Anchor(torch.autograd.Function):
    """Hands on `x` as if it depended on `memory`.

    Zero-bubble schedules find a stage's parameters on the way from its inputs to its outputs (Qi et al. 2024): the
    target's embedding, which reads no input, would get no gradient in a stage that ends before it meets the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        """Returns `x`."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of `x`; that of `memory` is zero."""
        return gradient, None


def _anchor(x: Tensor, *, memory: Tensor) -> Tensor:
    anchored: Tensor = _Anchor.apply(x, memory)  # type: ignore[no-untyped-call]
    return anchored


def places_of(side: NestedMap) -> tuple[Tensor | None, Tensor]:
    """Returns the segment ids [B, T], or None, and the positions [B or 1, T] of a batch's source or target."""
    segment_ids: Tensor | None = side.get("segment_ids")
    positions: Tensor | None = side.get("positions")
    if positions is None:
        if segment_ids is not None:
            positions = positions_of(segment_ids)
        else:
            positions = torch.arange(side.ids.shape[1], device=side.ids.device).unsqueeze(0)
    return segment_ids, positions


def _layer(module: nn.Module) -> TransformerLayer:
    """Types a layer of a stack."""
    if not isinstance(module, TransformerLayer):
        raise TypeError(f"layers: must be TransformerLayers, but one is {type(module).__name__}.")
    return module
