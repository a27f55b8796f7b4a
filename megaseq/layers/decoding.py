"""Running a decoder token by token: its state, one step, and dropping or reordering what is being decoded.

The state is a NestedMap:

- `length`: tokens fed so far; `num_sources` B and `num_hypotheses` K; `width` of the cache.
- `memory`: for each layer the keys and values [B, S, M, H] of its cross-attention, once for each source and never
  copied for its hypotheses, which attend to it as if they were places of one query.
- `memory_segment_ids`: [B, S] or None; `memory_mask`: the AttentionMask made of it.
- `cache`: a flat buffer that holds [length, B*K, width], the self-attention keys and values of all layers side by side.
  Time comes first, so that a step appends in place and one gather reorders all layers. `spare` is the buffer into which
  it gathers; the two change places.
- `history`: for each layer its position bias [1, N, 1, capacity], longest distance first, or None.
- `attention_probs`: [B*K, S], after a step with `need_attention`: the last cross-attention's weights, mean over heads.

`step` and `select` reuse the buffers of the state they are given: go on with the state they return.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from megaseq.base import NestedMap
from megaseq.base.errors import must
from megaseq.kernels.attention import AttentionMask
from megaseq.layers.attention import SelfAttention
from megaseq.layers.norm import Norm
from megaseq.layers.positions import Positions
from megaseq.layers.relative import PositionBias
from megaseq.layers.rotary import Rotation, RotationKey
from megaseq.layers.transformer import TransformerLayer


class StepStack(Protocol):
    """A decoder, or a run of its layers, as far as it is read here."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """Transformer layers, in order."""

    @property
    def positions(self) -> Positions | None:
        """Absolute positions that embeddings get; None: none, or `x` has them."""

    @property
    def input_norm(self) -> Norm | None:
        """Norm of the embeddings."""

    @property
    def position_bias(self) -> PositionBias | None:
        """Bias that all layers share."""

    def finish(self, x: Tensor) -> Tensor:
        """Returns the output of the stream after the last layer."""


INITIAL_CAPACITY = 32
"""Tokens that the first buffer has room for; it doubles when full."""


def prefill(decoder: StepStack, *, memory: NestedMap) -> NestedMap:
    """Returns the state before the first step, with one hypothesis a source.

    Args:
        decoder: the stack.
        memory: what `EncoderDecoder.encode` returned for one source a row: `states` [B, S, E], `segment_ids` or None.
    """
    segment_ids: Tensor | None = memory.segment_ids
    if segment_ids is not None and bool((segment_ids > 0).all()):
        segment_ids = None
    pairs = [
        None if layer.cross_attention is None else layer.cross_attention.project_memory(memory.states)
        for layer in _layers(decoder)
    ]
    state = NestedMap(
        length=0,
        num_sources=memory.states.shape[0],
        num_hypotheses=1,
        memory=tuple(pairs),
        memory_segment_ids=segment_ids,
        memory_mask=_mask(segment_ids),
        cache=memory.states.new_empty(0),
        spare=None,
        width=sum(2 * layer.self_attention.key_dim for layer in _layers(decoder)),
        history=(),
    )
    _remember_biases(decoder, state=state, capacity=INITIAL_CAPACITY)
    return state


def step(decoder: StepStack, *, state: NestedMap, x: Tensor, need_attention: bool = False) -> tuple[Tensor, NestedMap]:
    """Runs one token of every hypothesis through the decoder.

    Args:
        decoder: the stack.
        state: before this token.
        x: embeddings [B*K, D].
        need_attention: whether to leave `attention_probs` in the state.

    Returns:
        Hidden states [B*K, D], and the state after this token.

    Raises:
        ParamsError: a number of tokens that is not that of the hypotheses.
    """
    rows, length = state.num_sources * state.num_hypotheses, state.length
    if x.shape[0] != rows:
        raise must("step", f"get one token for each of {rows} hypotheses", x.shape[0], "Call select when they change")
    _reserve(decoder, state=state)
    width = state.width
    cache = state.cache[: (length + 1) * rows * width].view(length + 1, rows, width)
    if decoder.positions is not None:
        x = x + decoder.positions.at(length, like=x)
    if decoder.input_norm is not None:
        x = decoder.input_norm(x)
    x = x.view(state.num_sources, state.num_hypotheses, -1)
    rotations: dict[RotationKey, Rotation] = {}
    start = 0
    layers, memory, history = _layers(decoder), state.memory, state.history
    mask = state.memory_mask
    for index, layer in enumerate(layers):
        block = layer.self_attention
        bias = history[index]
        stop = start + 2 * block.key_dim
        x = _self_attention_step(block, x=x, cache=cache[:, :, start:stop], bias=bias, rotations=rotations)
        start = stop
        if layer.cross_attention is not None:
            key, value = memory[index]
            if need_attention and index == len(layers) - 1:
                weights = layer.cross_attention.weights(x, key=key, mask=mask)
                state.attention_probs = weights.mean(dim=1).flatten(0, 1)
            x = layer.cross_attention(x, key=key, value=value, mask=mask)
        x = layer.ffn(x)
    state.length = length + 1
    return decoder.finish(x).view(rows, -1), state


def _self_attention_step(
    block: SelfAttention, *, x: Tensor, cache: Tensor, bias: Tensor | None, rotations: dict[RotationKey, Rotation]
) -> Tensor:
    """Self-attention of one token [B, K, D] to `cache` [t + 1, B*K, 2 * M * H], whose last row it writes."""
    length, rows, _ = cache.shape
    fused = block.qkv(block.enter(x)).view(rows, 1, -1)
    rotation: Rotation | None = None
    if block.rotary is not None:
        if block.rotary.key not in rotations:
            places = torch.full((1, 1), length - 1, device=x.device)
            rotations[block.rotary.key] = block.rotary.rotation(places)
        rotation = rotations[block.rotary.key]
    query, key, value = block.split(fused, rotation=rotation)
    entry = cache[-1].view(rows, 2, block.num_key_value_heads, block.head_dim)
    entry[:, 0].copy_(key[:, 0])
    entry[:, 1].copy_(value[:, 0])
    first = 0 if block.params.window is None else max(0, length - block.params.window)
    past = cache[first:].view(length - first, rows, 2, block.num_key_value_heads, block.head_dim)
    keys, values = past.permute(2, 1, 0, 3, 4).unbind(0)
    if bias is not None:
        bias = bias[..., bias.shape[-1] - (length - first) :]
    heads = block.attend(query, key=keys, value=values, mask=None, bias=bias)
    return block.leave(x, block.output(heads.view(*x.shape[:2], -1)))


def select(state: NestedMap, *, sources: Tensor, hyps: Tensor) -> NestedMap:
    """Keeps some sources and, of each, some hypotheses, in a new order.

    Args:
        state: before.
        sources: [B'], indices below B, of the sources to keep.
        hyps: [B', K'], for each the hypotheses (0 to K-1 of that source) that go on; one may be taken several times.

    Returns:
        The state with B' sources of K' hypotheses.
    """
    old = (state.num_sources, state.num_hypotheses)
    new = (hyps.shape[0], hyps.shape[1])
    kept = torch.arange(old[0], device=sources.device)
    same_sources = new[0] == old[0] and bool(torch.equal(sources, kept))
    rows = (sources.unsqueeze(1) * old[1] + hyps).view(-1)
    if not (new == old and bool(torch.equal(rows, torch.arange(rows.numel(), device=rows.device)))):
        _reorder(state, rows=rows, before=old[0] * old[1])
    if not same_sources:
        state.memory = tuple(
            None if pair is None else tuple(tensor.index_select(0, sources) for tensor in pair) for pair in state.memory
        )
        if state.memory_segment_ids is not None:
            state.memory_segment_ids = state.memory_segment_ids.index_select(0, sources)
            state.memory_mask = _mask(state.memory_segment_ids)
    state.num_sources, state.num_hypotheses = new
    return state


def _reorder(state: NestedMap, *, rows: Tensor, before: int) -> None:
    """Gathers hypotheses `rows` of the cache's `before` into the spare buffer, and swaps the two."""
    length, count = state.length, rows.numel()
    if length == 0:
        return
    width = state.width
    needed = length * count * width
    room = max(INITIAL_CAPACITY, 2 * length) * count * width
    spare: Tensor | None = state.spare
    if spare is None or spare.numel() < needed:
        spare = state.cache.new_empty(max(state.cache.numel(), room))
    source = state.cache[: length * before * width].view(length, before, width)
    torch.index_select(source, 1, rows, out=spare[:needed].view(length, count, width))
    state.cache, state.spare = spare, state.cache


def _reserve(decoder: StepStack, *, state: NestedMap) -> None:
    """Makes room for one more token in the cache and in the remembered biases."""
    rows, length, width = state.num_sources * state.num_hypotheses, state.length, state.width
    if state.cache.numel() < (length + 1) * rows * width:
        larger = state.cache.new_empty(max(INITIAL_CAPACITY, 2 * length) * rows * width)
        larger[: length * rows * width] = state.cache[: length * rows * width]
        state.cache, state.spare = larger, None
    capacity = max((bias.shape[-1] for bias in state.history if bias is not None), default=length + 1)
    if capacity < length + 1:
        _remember_biases(decoder, state=state, capacity=2 * capacity)


def _remember_biases(decoder: StepStack, *, state: NestedMap, capacity: int) -> None:
    """Computes each layer's position bias of a token on the `capacity` tokens up to itself."""
    like = state.cache
    shared: Tensor | None = None
    if decoder.position_bias is not None:
        shared = decoder.position_bias.history(capacity, device=like.device).to(like.dtype).contiguous()
    biases = []
    for layer in _layers(decoder):
        own = layer.self_attention.position_bias
        biases.append(shared if own is None else own.history(capacity, device=like.device).to(like.dtype).contiguous())
    state.history = tuple(biases)


def _mask(segment_ids: Tensor | None) -> AttentionMask | None:
    """Returns the mask that hides the sources' padding, None where there is none."""
    return None if segment_ids is None else AttentionMask(key_segment_ids=segment_ids.clamp(max=1))


def _layers(decoder: StepStack) -> list[TransformerLayer]:
    """Returns the decoder's layers, typed."""
    return list(decoder.layers)  # type: ignore[arg-type]
