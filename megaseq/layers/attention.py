"""Multi-head attention blocks: of a sequence to itself, and of a decoder to the encoder's output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megaseq.base import FROM_PARENT, REQUIRED
from megaseq.base.errors import must
from megaseq.kernels.attention import AttentionMask, RelativeBias, attention
from megaseq.kernels.dropout import DropoutMask
from megaseq.layers.base import inherit
from megaseq.layers.branch import Branch
from megaseq.layers.linear import Linear
from megaseq.layers.norm import Norm
from megaseq.layers.relative import PositionBias
from megaseq.layers.rotary import Rotary, Rotation
from megaseq.layers.shared_rows import SharedMask
from megaseq.layers.sight import Mask, Sight, inner_of, stream_of
from megaseq.layers.tokens import Tokens, starts_of_weights
from megaseq.parallel.spec import ContextRanks, Ranks


class Attention(Branch):
    """Base of both attentions: heads, scores, output projection."""

    class Params(Branch.Params):
        num_heads: int = REQUIRED
        """Query heads N."""
        num_key_value_heads: int | None = None
        """Key and value heads M: None is one for each query head; fewer is grouped-query, 1 multi-query attention."""
        head_dim: int | None = None
        """Width H of a head; None is model_dim / num_heads."""
        scale: float | None = None
        """Factor of the scores; None is H^-0.5, T5 has 1.0."""
        soft_cap: float | None = None
        """Scores are squeezed to cap * tanh(scores / cap) (Gemma 2); None leaves them."""
        attention_dropout: float = FROM_PARENT
        """Chance of zeroing an attention weight, in training."""
        query_norm: Norm.Params | None = None
        """Norm over each query head (Henry et al. 2020); None is none."""
        key_norm: Norm.Params | None = None
        """Norm over each key head; None is none."""
        output: Linear.Params = Linear.Params()
        """Heads to D."""

        def validate(self) -> Iterator[str]:
            """Refuses head counts and widths that do not fit together."""
            yield from super().validate()
            if self.num_heads < 1:
                yield f"num_heads: must be at least 1, but is {self.num_heads}. Set it to model_dim / 64, say."
            elif self.num_key_value_heads is not None and (
                self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads
            ):
                yield (
                    f"num_key_value_heads: must divide num_heads ({self.num_heads}), but is "
                    f"{self.num_key_value_heads}. None is one for each query head."
                )
            elif self.head_dim is None and self.model_dim % self.num_heads:
                yield (
                    f"num_heads: must divide model_dim ({self.model_dim}), but is {self.num_heads}. "
                    "Choose another number, or set head_dim."
                )

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        # Of the heads, a tensor rank has a run; these are its numbers, the params have those of the whole.
        self.num_heads = p.num_heads
        self.first_head = 0
        self.num_key_value_heads = p.num_key_value_heads or p.num_heads
        self.head_dim = p.head_dim or p.model_dim // p.num_heads
        self.query_dim = self.num_heads * self.head_dim
        self.key_dim = self.num_key_value_heads * self.head_dim
        self.scale = self.head_dim**-0.5 if p.scale is None else p.scale
        self.query_norm: Norm | None = None
        self.key_norm: Norm | None = None
        if p.query_norm is not None:
            self.query_norm = p.query_norm.replace(dim=self.head_dim).instantiate()
        if p.key_norm is not None:
            self.key_norm = p.key_norm.replace(dim=self.head_dim).instantiate()
        output = inherit(p.output, input_dim=self.query_dim, output_dim=p.model_dim, bias=p.bias)
        self.output: Linear = output.instantiate(axes=("model", "heads"), granule=self.head_dim)

    def divide(self, ranks: Ranks) -> None:
        """Learns which heads are here; where there are fewer key heads than ranks, several ranks have the same one."""
        super().divide(ranks)
        if "heads" not in ranks.divided:
            return
        self.first_head, stop = ranks.span(self.num_heads)
        self.num_heads = stop - self.first_head
        self.num_key_value_heads = max(1, self.num_key_value_heads // ranks.size)
        self.query_dim = self.num_heads * self.head_dim
        self.key_dim = self.num_key_value_heads * self.head_dim
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.of_heads = True

    def share_rows(self, ranks: ContextRanks) -> None:
        """Checks that ranks that share rows can be dealt heads, where they are to be."""
        if ranks.method != "ulysses":
            return
        for heads in (self.num_heads, self.num_key_value_heads):
            if heads % ranks.size:
                raise must(
                    "parallel.context",
                    f"divide the {heads} heads (of each tensor rank) of {self.path or 'attention'} with ulysses",
                    ranks.size,
                    "Use parallel.context_method=ring, which needs no heads",
                )

    def attend(
        self,
        query: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
        bias: Tensor | RelativeBias | None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """Attends with `query` [B, T, N, H] to `key` and `value` [B, S, M, H]; returns the heads as [B, T, N*H].

        `tokens` says which rows and tokens the queries are; None: the context's rows, whole.
        """
        dropout: DropoutMask | None = None
        rate = self.params.attention_dropout if self.training else 0.0
        if isinstance(mask, SharedMask):
            shared = mask.attend(
                query,
                key=key,
                value=value,
                bias=bias,
                scale=self.scale,
                soft_cap=self.params.soft_cap,
                heads=(self.first_head, self.params.num_heads),
                dropout=(rate, self.dropout_key(site=1)) if rate else None,
            )
            return shared.flatten(2)
        if rate:
            offset = starts_of_weights(
                tokens=tokens or self.tokens_of(query),
                batch=query.shape[0],
                heads=(self.first_head, self.num_heads, self.params.num_heads),
                lengths=(query.shape[1], key.shape[1]),
                device=query.device,
            )
            dropout = DropoutMask(rate, self.dropout_key(site=1), offset)
        heads = attention(
            query,
            key=key,
            value=value,
            mask=mask,
            bias=bias,
            scale=self.scale,
            soft_cap=self.params.soft_cap,
            dropout=dropout,
        )
        return heads.flatten(2)


class SelfAttention(Attention):
    """Attention of a sequence to itself; query, key and value are one matrix product."""

    class Params(Attention.Params):
        causal: bool = FROM_PARENT
        """Whether later keys are hidden."""
        window: int | None = None
        """Only keys fewer than this many places away, on either side, are seen; None sees all."""
        rotary: Rotary.Params | None = None
        """Rotary positions; None is none."""
        position_bias: PositionBias.Params | None = None
        """A bias of this layer's own (UMT5); None is the stack's, if it has one."""
        qkv: Linear.Params = Linear.Params()
        """D to the queries, keys and values, fused in this order."""

        def validate(self) -> Iterator[str]:
            """Refuses an empty window."""
            yield from super().validate()
            if self.window is not None and self.window < 1:
                yield f"window: must be at least 1, but is {self.window}. Use null for none."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        parts = (self.query_dim, self.key_dim, self.key_dim)
        qkv = inherit(p.qkv, input_dim=p.model_dim, output_dim=sum(parts), bias=p.bias)
        self.qkv: Linear = qkv.instantiate(axes=("heads", "model"), parts=parts, granule=self.head_dim)
        self.rotary: Rotary | None = None
        if p.rotary is not None:
            self.rotary = p.rotary.replace(head_dim=self.head_dim).instantiate()
        self.position_bias: PositionBias | None = None
        if p.position_bias is not None:
            bias = inherit(p.position_bias, num_heads=p.num_heads, bidirectional=not p.causal)
            self.position_bias = bias.instantiate()

    def split(self, fused: Tensor, *, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the queries [B, T, N, H], keys and values [B, T, M, H] of what `qkv` made, normed and turned."""
        heads = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        query, key, value = torch.split(fused.view(*fused.shape[:2], -1, self.head_dim), heads, dim=2)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.rotary is not None and rotation is not None:
            query, key = self.rotary(query, rotation=rotation), self.rotary(key, rotation=rotation)
        return query, key, value

    def forward(self, x: Tensor, *, sight: Sight) -> Tensor:
        """Maps the residual stream `x` [B, T, D] to the next [B, T, D]."""
        tokens = stream_of(sight)
        fused = self.qkv(self.enter(x, tokens=tokens), tokens=tokens)
        rotation: Rotation | None = None
        if self.rotary is not None:
            if self.rotary.key not in sight.rotations:
                sight.rotations[self.rotary.key] = self.rotary.rotation(sight.positions)
            rotation = sight.rotations[self.rotary.key]
        bias = sight.bias
        if self.position_bias is not None and sight.row is not None:
            bias = sight.row.bias(self.position_bias)
        elif self.position_bias is not None:
            bias = self.position_bias(fused.shape[1], device=x.device)
        query, key, value = self.split(fused, rotation=rotation)
        mask = sight.mask(self.params.window)
        heads = self.attend(query, key=key, value=value, mask=mask, bias=bias, tokens=inner_of(sight))
        return self.leave(x, self.output(heads, tokens=tokens), tokens=tokens)


class CrossAttention(Attention):
    """Attention of the decoder to the encoder's output; key and value are one matrix product."""

    class Params(Attention.Params):
        memory_dim: int = FROM_PARENT
        """Width of the encoder's output."""
        query: Linear.Params = Linear.Params()
        """D to the queries."""
        key_value: Linear.Params = Linear.Params()
        """The encoder's width to keys and values, fused in this order."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        query = inherit(p.query, input_dim=p.model_dim, output_dim=self.query_dim, bias=p.bias)
        self.query: Linear = query.instantiate(axes=("heads", "model"), granule=self.head_dim)
        parts = (self.key_dim, self.key_dim)
        key_value = inherit(p.key_value, input_dim=p.memory_dim, output_dim=sum(parts), bias=p.bias)
        self.key_value: Linear = key_value.instantiate(axes=("heads", "model"), parts=parts, granule=self.head_dim)
        # The end of the encoder sums the gradients of all layers' maps at once.
        self.key_value.input_is_copied = True

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, S, M, H] of the encoder's output `memory` [B, S, E]."""
        batch, length, _ = memory.shape
        fused = self.key_value(memory).view(batch, length, 2 * self.num_key_value_heads, self.head_dim)
        key, value = fused.split(self.num_key_value_heads, dim=2)
        return (key if self.key_norm is None else self.key_norm(key)), value

    def forward(
        self, x: Tensor, *, key: Tensor, value: Tensor, mask: Mask | None, sight: Sight | None = None
    ) -> Tensor:
        """Attends with the residual stream to an encoded source.

        Args:
            x: [B, T, D]; in decoding T is the hypotheses of a source, which share its keys and values.
            key: [B, S, M, H], from `project_memory`.
            value: [B, S, M, H].
            mask: which source tokens each place sees; None: all.
            sight: which tokens of the target `x` holds; None: all of the context's rows.

        Returns:
            The next residual stream [B, T, D].
        """
        tokens = stream_of(sight)
        query = self.project_query(x, tokens=tokens)
        heads = self.attend(query, key=key, value=value, mask=mask, bias=None, tokens=inner_of(sight))
        return self.leave(x, self.output(heads, tokens=tokens), tokens=tokens)

    def project_query(self, x: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """Returns the queries [B, T, N, H] of the residual stream `x` [B, T, D], which has `tokens`."""
        flat = self.query(self.enter(x, tokens=tokens), tokens=tokens)
        query: Tensor = flat.view(*flat.shape[:2], self.num_heads, self.head_dim)
        if self.query_norm is not None:
            query = self.query_norm(query)
        return query

    def weights(self, x: Tensor, *, key: Tensor, mask: AttentionMask | None) -> Tensor:
        """Returns the attention weights [B, N, T, S] that `forward` uses, of all heads; slow and without gradient over
        tensor ranks, for those who want to see them."""
        query = self.project_query(x).transpose(1, 2)
        keys = key.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2).permute(0, 2, 3, 1)
        scores = (query @ keys).float() * self.scale
        if self.params.soft_cap is not None:
            scores = self.params.soft_cap * torch.tanh(scores / self.params.soft_cap)
        if mask is not None:
            allowed = mask.allowed(query_length=x.shape[1], key_length=key.shape[1], device=x.device)
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights: Tensor = torch.softmax(scores, dim=-1)
        if self.ranks is not None and self.num_heads < self.params.num_heads:
            weights = self.ranks.gather(weights, length=self.params.num_heads, dim=1)
        return weights
