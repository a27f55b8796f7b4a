"""Running a decoder token by token: its state, one step, and dropping or reordering what is being decoded.

The state is a NestedMap:

- `num_sources` B and `num_hypotheses` K.
- `memory`: for each layer the keys and values [B, S, M, H] of its cross-attention, once for each source and never
  copied for its hypotheses, which attend to it as if they were places of one query.
- `memory_segment_ids`: [B, S] or None; `memory_mask`: the AttentionMask made of it.
- `memory_counts`: [B], how many of its S places each source has, where keys are looked up; else None.
- `lookup`: whether keys are looked up in tables, `by_op`: by `decode_attention` and not by the compiled extension.
- `cache`: the `TokenCache` of the self-attentions' keys and values, which counts the tokens fed so far.
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
from megaseq.base.errors import AsText, must
from megaseq.kernels.attention import AttentionMask
from megaseq.kernels.attention.lookup import attend_shared, fits_lookup
from megaseq.kernels.decode_attention import KeyValueCache, decode_attention, wanted_for
from megaseq.kernels.decode_attention.configs import MAX_WIDTH
from megaseq.layers.attention import CrossAttention, SelfAttention
from megaseq.layers.fixed_cache import FixedCache
from megaseq.layers.norm import Norm
from megaseq.layers.positions import Positions
from megaseq.layers.relative import PositionBias
from megaseq.layers.rotary import Rotation, RotationKey
from megaseq.layers.token_cache import INITIAL_CAPACITY, LookupCache, MovingCache, TokenCache
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
    width = sum(2 * layer.self_attention.key_dim for layer in _layers(decoder))
    lookup = _fits_lookup(decoder, like=memory.states)
    cache: TokenCache = (LookupCache if lookup else MovingCache)(width=width, like=memory.states)
    state = NestedMap(
        num_sources=memory.states.shape[0],
        num_hypotheses=1,
        memory=tuple(pairs),
        memory_segment_ids=segment_ids,
        memory_mask=_mask(segment_ids),
        memory_counts=None,
        lookup=lookup,
        by_op=wanted_for(memory.states),
        like=memory.states.new_empty(0),
        cache=cache,
        history=(),
    )
    _count_memory(state)
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
    rows = state.num_sources * state.num_hypotheses
    if x.shape[0] != rows:
        raise must("step", f"get one token for each of {rows} hypotheses", x.shape[0], "Call select when they change")
    cache: TokenCache = state.cache
    cache.begin(rows)
    _extend_biases(decoder, state=state)
    if decoder.positions is not None:
        x = x + _position(decoder.positions, cache=cache, like=x)
    if decoder.input_norm is not None:
        x = decoder.input_norm(x)
    x = x.view(state.num_sources, state.num_hypotheses, -1)
    rotations: dict[RotationKey, Rotation] = {}
    start = 0
    layers, memory, history = _layers(decoder), state.memory, state.history
    mask = state.memory_mask
    for index, layer in enumerate(layers):
        block = layer.self_attention
        x = _self_attention_step(block, x=x, cache=cache, start=start, bias=history[index], rotations=rotations)
        start += 2 * block.key_dim
        if layer.cross_attention is not None:
            key, value = memory[index]
            if need_attention and index == len(layers) - 1:
                weights = layer.cross_attention.weights(x, key=key, mask=mask)
                state.attention_probs = weights.mean(dim=1).flatten(0, 1)
            x = _cross_attention_step(layer.cross_attention, x=x, key=key, value=value, state=state)
        x = layer.ffn(x)
    cache.end()
    return decoder.finish(x).view(rows, -1), state


def _self_attention_step(
    block: SelfAttention,
    *,
    x: Tensor,
    cache: TokenCache,
    start: int,
    bias: Tensor | None,
    rotations: dict[RotationKey, Rotation],
) -> Tensor:
    """Self-attention of one token [B, K, D] to itself and those in `cache`, to which it is added."""
    fused = block.qkv(block.enter(x)).view(x.shape[0] * x.shape[1], 1, -1)
    rotation: Rotation | None = None
    if block.rotary is not None:
        if block.rotary.key not in rotations:
            place = cache.place
            places = torch.full((1, 1), place, device=x.device) if isinstance(place, int) else place.view(1, 1)
            rotations[block.rotary.key] = block.rotary.rotation(places)
        rotation = rotations[block.rotary.key]
    heads = cache.attend(block, start=start, heads=block.split(fused, rotation=rotation), bias=bias)
    return block.leave(x, block.output(heads.view(*x.shape[:2], -1)))


def _cross_attention_step(block: CrossAttention, *, x: Tensor, key: Tensor, value: Tensor, state: NestedMap) -> Tensor:
    """Cross-attention of one token [B, K, D] to the sources."""
    counts, mask = state.memory_counts, state.memory_mask
    if not state.lookup or (counts is None and mask is not None):
        out: Tensor = block(x, key=key, value=value, mask=mask)
        return out
    query = block.project_query(x)
    if state.by_op:
        cache, soft_cap = KeyValueCache(key, value), block.params.soft_cap
        heads = decode_attention(query, cache=cache, lengths=counts, scale=block.scale, soft_cap=soft_cap)
    else:
        heads = attend_shared(query, key=key, value=value, counts=counts, scale=block.scale)
    return block.leave(x, block.output(heads.flatten(2)))


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
        state.cache.select(rows, before=old[0] * old[1])
    if not same_sources:
        state.memory = tuple(
            None if pair is None else tuple(tensor.index_select(0, sources) for tensor in pair) for pair in state.memory
        )
        if state.memory_segment_ids is not None:
            state.memory_segment_ids = state.memory_segment_ids.index_select(0, sources)
            state.memory_mask = _mask(state.memory_segment_ids)
        if state.memory_counts is not None:
            state.memory_counts = state.memory_counts.index_select(0, sources)
    state.num_sources, state.num_hypotheses = new
    return state


def reorder(state: NestedMap, *, hyps: Tensor) -> NestedMap:
    """`select` of all sources, which reads nothing back from the device.

    Args:
        state: before.
        hyps: [B, K'], for each source the hypotheses (0 to K-1) that go on.

    Returns:
        The state with K' hypotheses of each source.
    """
    count, before = state.num_sources, state.num_hypotheses
    first = torch.arange(0, count * before, before, device=hyps.device)
    state.cache.select((first.unsqueeze(1) + hyps).view(-1), before=count * before)
    state.num_hypotheses = hyps.shape[1]
    return state


def fix(decoder: StepStack, *, state: NestedMap, num_hypotheses: int, num_tokens: int) -> tuple[NestedMap, int]:
    """Makes room for tokens ahead, so that up to that room all steps are the same ops on the same memory.

    Args:
        decoder: the stack.
        state: before the first step; or later, to make more room.
        num_hypotheses: K, of each source, after the first step.
        num_tokens: T, tokens in all that are wanted.

    Returns:
        The state, and how many tokens in all there is room for: `num_tokens`, or as many as have positions.

    Raises:
        ParamsError: a decoder whose attention is not by `decode_attention`, or one without a position for one more.
    """
    cache = state.cache
    positions = decoder.positions
    room = num_tokens if positions is None or positions.most is None else min(num_tokens, positions.most)
    if isinstance(cache, FixedCache):
        if room <= cache.capacity and positions is not None:
            positions.at(cache.capacity, like=state.like)  # which says what is too short
        cache.grow(room)
    elif not (state.lookup and state.by_op):
        raise must(
            "fix",
            "meet a decoder in evaluation whose attention is run by decode_attention",
            AsText(f"one whose attention is not, on {state.like.device} in {state.like.dtype}"),
            "Decode on a GPU with Triton, in bf16 and not under autocast, and with heads of an ordinary width",
        )
    else:
        width = sum(2 * layer.self_attention.key_dim for layer in _layers(decoder))
        rows = state.num_sources * num_hypotheses
        state.cache = FixedCache(width=width, rows=rows, capacity=room, like=state.like)
    _remember_biases(decoder, state=state, capacity=room)
    return state, room


def _position(positions: Positions, *, cache: TokenCache, like: Tensor) -> Tensor:
    """Returns the vector [D] or [1, D] of the next token's position."""
    if isinstance(cache, FixedCache):
        return positions.lookup(cache.place, dtype=like.dtype, length=cache.capacity)
    assert isinstance(cache.place, int)
    return positions.at(cache.place, like=like)


def _fits_lookup(decoder: StepStack, *, like: Tensor) -> bool:
    """Whether all attentions of `decoder` are such as may look their keys up in a table."""
    layers = _layers(decoder)
    blocks = [block for layer in layers for block in (layer.self_attention, layer.cross_attention) if block]
    if wanted_for(like):
        return not any(block.training for block in blocks) and max(block.head_dim for block in blocks) <= MAX_WIDTH
    plain = not any(block.training or block.params.soft_cap is not None for block in blocks)
    return plain and fits_lookup(like, head_dims=tuple(block.head_dim for block in blocks))


def _count_memory(state: NestedMap) -> None:
    """Sets `memory_counts` where padding only follows what is real."""
    state.memory_counts = None
    if state.lookup and state.memory_segment_ids is not None:
        real = state.memory_segment_ids > 0
        counts = real.sum(dim=1)
        if bool((real == (torch.arange(real.shape[1], device=counts.device) < counts.unsqueeze(1))).all()):
            state.memory_counts = counts


def _extend_biases(decoder: StepStack, *, state: NestedMap) -> None:
    """Makes the remembered biases long enough for one more token."""
    place = state.cache.place
    if isinstance(place, Tensor):
        return  # `fix` has made them as long as the cache.
    needed = place + 1
    capacity = max((bias.shape[-1] for bias in state.history if bias is not None), default=needed)
    if capacity < needed:
        _remember_biases(decoder, state=state, capacity=2 * capacity)


def _remember_biases(decoder: StepStack, *, state: NestedMap, capacity: int) -> None:
    """Computes each layer's position bias of a token on the `capacity` tokens up to itself."""
    like = state.like
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
