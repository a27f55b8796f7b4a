"""A Transformer layer, and the stack of them that is an encoder or a decoder without its embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megaseq.base import FROM_PARENT, REQUIRED
from megaseq.base.errors import AsText, must
from megaseq.kernels.attention import AttentionMask
from megaseq.layers.attention import CrossAttention, SelfAttention
from megaseq.layers.base import Layer, inherit
from megaseq.layers.branch import ResidualStyle
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.moe import MixtureOfExperts
from megaseq.layers.norm import LayerNorm, Norm
from megaseq.layers.positions import Positions
from megaseq.layers.relative import PositionBias
from megaseq.layers.shared_rows import SharedRow
from megaseq.layers.sight import Mask, Sight, stream_of
from megaseq.layers.tokens import Tokens
from megaseq.parallel.spec import Axis, ContextRanks


class TransformerLayer(Layer):
    """Self-attention, in a decoder cross-attention, then the feed-forward block; each is a residual branch."""

    class Params(Layer.Params):
        model_dim: int = FROM_PARENT
        """Width D."""
        memory_dim: int = FROM_PARENT
        """Width of the encoder's output; a layer without cross-attention does not read it."""
        causal: bool = FROM_PARENT
        """Whether self-attention hides later tokens."""
        norm: Norm.Params = FROM_PARENT
        """The norm of every branch."""
        residual: ResidualStyle = FROM_PARENT
        """Where the norms sit: `pre`, `post` or `sandwich`."""
        dropout: float = FROM_PARENT
        """Dropout of every branch before the sum."""
        attention_dropout: float = FROM_PARENT
        """Dropout of attention weights."""
        activation_dropout: float = FROM_PARENT
        """Dropout inside the feed-forward block."""
        bias: bool = FROM_PARENT
        """Whether linear maps have biases."""
        self_attention: SelfAttention.Params = SelfAttention.Params()
        """Attention to the sequence itself."""
        cross_attention: CrossAttention.Params | None = None
        """Attention to the encoder's output; None in an encoder."""
        ffn: FeedForward.Params = FeedForward.Params()
        """The position-wise block, or a mixture of experts in its place."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        shared = {name: getattr(p, name) for name in ("model_dim", "norm", "residual", "dropout", "bias")}
        attention = {**shared, "attention_dropout": p.attention_dropout}
        self.self_attention: SelfAttention = inherit(p.self_attention, **attention, causal=p.causal).instantiate()
        self.cross_attention: CrossAttention | None = None
        if p.cross_attention is not None:
            self.cross_attention = inherit(p.cross_attention, **attention, memory_dim=p.memory_dim).instantiate()
        if p.causal and isinstance(p.ffn, MixtureOfExperts.Params) and p.ffn.router.method == "expert_choice":
            raise must(
                "ffn.router.method",
                "be top1 or top2 in a decoder",
                p.ffn.router.method,
                "Experts that choose among a row's tokens read later ones",
            )
        self.ffn: FeedForward | MixtureOfExperts = inherit(
            p.ffn, **shared, activation_dropout=p.activation_dropout
        ).instantiate()

    def forward(
        self, x: Tensor, *, sight: Sight, memory: Tensor | None = None, memory_mask: Mask | None = None
    ) -> Tensor:
        """Maps the residual stream `x` [B, T, D] to the next [B, T, D].

        Args:
            x: the residual stream.
            sight: what self-attention needs to know of the batch.
            memory: the encoder's output [B, S, E]; needed by a layer with cross-attention.
            memory_mask: which of it each place sees.
        """
        x = self.self_attention(x, sight=sight)
        if self.cross_attention is not None and memory is not None:
            key, value = self.cross_attention.project_memory(memory)
            x = self.cross_attention(x, key=key, value=value, mask=memory_mask, sight=sight)
        out: Tensor = self.ffn(x, sight=sight)
        return out


class Stack(Layer):
    """Base of encoder and decoder: embeddings [B, T, D] in, hidden states [B, T, D] out."""

    class Params(Layer.Params):
        model_dim: int = FROM_PARENT
        """Width D."""
        memory_dim: int = FROM_PARENT
        """Width of the encoder's output, in a decoder."""
        num_layers: int = REQUIRED
        """Layers."""
        layer: TransformerLayer.Params = TransformerLayer.Params()
        """What every layer is like."""
        layers: dict[str, TransformerLayer.Params] = {}
        """Layers that differ, by index from 0; one that is named first becomes a copy of `layer`."""
        norm: Norm.Params = LayerNorm.Params()
        """The norm, of all branches and of input and output."""
        residual: ResidualStyle = "pre"
        """Where the branches' norms sit: `pre`, `post` or `sandwich`."""
        input_norm: bool = False
        """Whether the embeddings are normed (BART)."""
        final_norm: bool | None = None
        """Whether the output is normed; None: yes with `pre` and `sandwich`, no with `post`."""
        positions: Positions.Params | None = None
        """Absolute positions; None is none."""
        position_bias: PositionBias.Params | None = None
        """A bias on the scores that all layers share (T5, ALiBi); None is none."""
        dropout: float = 0.0
        """Dropout of the embeddings and of every branch."""
        output_dropout: bool = False
        """Whether the stack's output is dropped out too (T5)."""
        attention_dropout: float = 0.0
        """Dropout of attention weights."""
        activation_dropout: float = 0.0
        """Dropout inside the feed-forward blocks."""
        bias: bool = True
        """Whether linear maps have biases."""

        def default_item(self, field: str, key: str) -> TransformerLayer.Params | None:
            """Makes `layers.3` a copy of `layer` when it is first written to."""
            return self.layer.copy() if field == "layers" else None

        def validate(self) -> Iterator[str]:
            """Refuses layers that are not there."""
            if self.num_layers < 1:
                yield f"num_layers: must be at least 1, but is {self.num_layers}. 6 is usual."
            for key in self.layers:
                if not (key.isdecimal() and key == str(int(key)) and int(key) < self.num_layers):
                    yield (
                        f"layers.{key}: must be an index from 0 to {self.num_layers - 1}, but is {key!r}. "
                        "Remove it or raise num_layers."
                    )
            heads = self.layer.self_attention.num_heads
            for key, layer in self.layers.items():
                if self.position_bias is not None and layer.self_attention.num_heads != heads:
                    yield (
                        f"layers.{key}.self_attention.num_heads: must be {heads} in every layer that shares "
                        f"position_bias, but is {layer.self_attention.num_heads}. Give each attention its own bias."
                    )

    params: Params
    causal = False
    read_by: Axis = "heads"
    """Axis of the outputs of the maps that read the stack's output."""

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        widths = ("model_dim", "memory_dim")
        others = ("norm", "residual", "dropout", "attention_dropout", "activation_dropout", "bias")
        shared = {name: getattr(p, name) for name in (*widths, *others)}
        # Share the tokens of rows, where a batch says so.
        self.context_ranks: ContextRanks | None = None
        self.positions: Positions | None = None
        if p.positions is not None:
            self.positions = inherit(p.positions, model_dim=p.model_dim).instantiate()
        self.position_bias: PositionBias | None = None
        if p.position_bias is not None:
            heads = p.layer.self_attention.num_heads
            self.position_bias = inherit(p.position_bias, num_heads=heads, bidirectional=not self.causal).instantiate()
        self.input_norm: Norm | None = None
        if p.input_norm:
            self.input_norm = p.norm.replace(dim=p.model_dim).instantiate()
        self.layers = nn.ModuleList(
            inherit(p.layers.get(str(index), p.layer), **shared, causal=self.causal).instantiate()
            for index in range(p.num_layers)
        )
        self.final_norm: Norm | None = None
        if p.final_norm if p.final_norm is not None else p.residual != "post":
            self.final_norm = p.norm.replace(dim=p.model_dim).instantiate()

    def share_rows(self, ranks: ContextRanks) -> None:
        """Learns which ranks share rows."""
        self.context_ranks = ranks

    def start(
        self, x: Tensor, *, segment_ids: Tensor | None, positions: Tensor, row_segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Sight]:
        """Returns the residual stream [B, T, D] before the first layer, and what the layers share.

        Args:
            x: embeddings [B, T, D].
            segment_ids: [B, T], 0 is padding; None: none.
            positions: [B or 1, T].
            row_segment_ids: [B, length] of the whole rows, where context ranks share their tokens; None: they do not.
        """
        sight = self.sight(segment_ids=segment_ids, positions=positions, row_segment_ids=row_segment_ids)
        return self.enter(x, segment_ids=segment_ids, positions=positions, sight=sight), sight

    def enter(self, x: Tensor, *, segment_ids: Tensor | None, positions: Tensor, sight: Sight) -> Tensor:
        """Returns the residual stream [B, T, D] before the first layer; arguments as of `start`."""
        tokens = sight.stream or self.tokens_of(positions)
        if self.positions is not None:
            x = self.positions(x, positions=positions, segment_ids=segment_ids, length=tokens.length)
        if self.input_norm is not None:
            x = self.input_norm(x)
        if tokens.divided and self.ranks is not None:
            x = self.ranks.cut_tokens(x)
        return self.drop(x, rate=self.params.dropout, tokens=tokens)

    def stream(self, tokens: Tokens) -> Tokens:
        """Returns what the residual stream has of the `tokens` that the blocks have: a tensor rank's share, or all.

        Rows whose length the tensor ranks do not divide are not shared, on any of them.
        """
        count = tokens.length if tokens.places is None else tokens.places.numel()
        if self.ranks is None or not self.ranks.sequence or count % self.ranks.size:
            return tokens
        share = count // self.ranks.size
        return tokens.part(start=self.ranks.index * share, length=share)

    def sight(
        self,
        *,
        segment_ids: Tensor | None,
        positions: Tensor,
        row_segment_ids: Tensor | None = None,
        biased: bool = True,
    ) -> Sight:
        """Returns what the layers share for one batch.

        Args:
            segment_ids: as of `start`.
            positions: as of `start`.
            row_segment_ids: as of `start`.
            biased: whether with the shared bias, which `finish` does not read.
        """
        row = self._row(row_segment_ids)
        tokens = self.tokens_of(positions) if row is None else row.tokens
        sight = Sight(
            segment_ids=segment_ids,
            positions=positions,
            causal=self.causal,
            inner=tokens,
            stream=self.stream(tokens),
            row=row,
        )
        if self.position_bias is None or not biased:
            return sight
        if row is not None:
            sight.bias = row.bias(self.position_bias)
        else:
            sight.bias = self.position_bias(positions.shape[-1], device=positions.device)
        return sight

    def _row(self, segment_ids: Tensor | None) -> SharedRow | None:
        if segment_ids is None:
            return None
        if self.context_ranks is None:
            raise must(
                "row_segment_ids", "be absent where no ranks share rows", AsText("there"), "Do not shard batches"
            )
        row_start, row_stride = self.context.row_start, self.context.row_stride
        return SharedRow(self.context_ranks, segment_ids=segment_ids, row_start=row_start, row_stride=row_stride)

    def finish(self, x: Tensor, *, sight: Sight | None = None) -> Tensor:
        """Returns the stack's output [B, T, D] of the residual stream after the last layer, all tokens of it.

        Where tensor ranks share `read_by`, everything that reads the output must be divided along it: gradients are
        summed over these ranks.
        """
        tokens = stream_of(sight)
        if self.final_norm is not None:
            x = self.final_norm(x, tokens=tokens)
        if self.params.output_dropout:
            x = self.drop(x, rate=self.params.dropout, site=1, tokens=tokens)
        if self.ranks is None:
            return x
        partial = self.read_by in self.ranks.divided
        if tokens is not None and tokens.divided:
            return self.ranks.join_tokens(x, partial=partial)
        return self.ranks.copy(x) if partial else x


class Encoder(Stack):
    """A stack in which every token sees every other of its segment."""

    class Params(Stack.Params):
        memory_dim: int = 0
        """Not read: an encoder has no cross-attention."""

    def forward(
        self, x: Tensor, *, segment_ids: Tensor | None, positions: Tensor, row_segment_ids: Tensor | None = None
    ) -> Tensor:
        """Encodes embeddings `x` [B, S, D]; returns [B, S, D].

        Args:
            x: embeddings.
            segment_ids: [B, S], 0 is padding; None: one segment a row, no padding.
            positions: [B or 1, S], 0-based in each segment.
            row_segment_ids: as of `start`.
        """
        x, sight = self.start(x, segment_ids=segment_ids, positions=positions, row_segment_ids=row_segment_ids)
        for layer in self.layers:
            x = layer(x, sight=sight)
        return self.finish(x, sight=sight)


class Decoder(Stack):
    """A causal stack with cross-attention to the encoder's output; `decoding` runs it token by token."""

    class Params(Stack.Params):
        layer: TransformerLayer.Params = TransformerLayer.Params(cross_attention=CrossAttention.Params())
        """What every layer is like."""

    causal = True
    read_by = "vocab"

    def forward(
        self,
        x: Tensor,
        *,
        segment_ids: Tensor | None,
        positions: Tensor,
        memory: Tensor,
        memory_segment_ids: Tensor | None,
        row_segment_ids: Tensor | None = None,
        memory_row_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Decodes embeddings `x` [B, T, D]; returns [B, T, D].

        Args:
            x: embeddings of the tokens before the ones to predict.
            segment_ids: [B, T], 0 is padding; None: one segment a row, no padding.
            positions: [B or 1, T], 0-based in each segment.
            memory: the encoder's output [B, S, E].
            memory_segment_ids: [B, S]; a token sees the source tokens of its own segment.
            row_segment_ids: as of `start`.
            memory_row_segment_ids: the same of the source.
        """
        x, sight = self.start(x, segment_ids=segment_ids, positions=positions, row_segment_ids=row_segment_ids)
        mask = memory_mask(sight, memory_segment_ids=memory_segment_ids, memory_row_segment_ids=memory_row_segment_ids)
        for layer in self.layers:
            x = layer(x, sight=sight, memory=memory, memory_mask=mask)
        return self.finish(x, sight=sight)


def memory_mask(
    sight: Sight, *, memory_segment_ids: Tensor | None, memory_row_segment_ids: Tensor | None = None
) -> Mask | None:
    """Returns who sees whom of the encoder's output; None: every token of the target sees all of it.

    Args:
        sight: of the target.
        memory_segment_ids: [B, S], of the source; None: none.
        memory_row_segment_ids: [B, length] of the source's whole rows, where context ranks share their tokens.
    """
    if sight.row is not None and memory_row_segment_ids is not None:
        return sight.row.mask_of(memory_row_segment_ids)
    if (sight.row is None) != (memory_row_segment_ids is None):
        raise must("row_segment_ids", "be there in both sides or in none", AsText("in one"), "Shard the whole batch")
    if sight.segment_ids is None and memory_segment_ids is None:
        return None
    return AttentionMask(query_segment_ids=sight.segment_ids, key_segment_ids=memory_segment_ids)


def positions_of(segment_ids: Tensor) -> Tensor:
    """Returns positions [B, T] that count from 0 in each run of equal `segment_ids` [B, T]."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
