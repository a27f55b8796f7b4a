"""The encoder-decoder Transformer: embeddings, two stacks, logits, and token-by-token decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megaseq.base import FROM_PARENT, REQUIRED, NestedMap
from megaseq.kernels.cross_entropy import VocabularyShare
from megaseq.layers import decoding
from megaseq.layers.auxiliary import add_up
from megaseq.layers.base import Layer, inherit
from megaseq.layers.embedding import Embedding
from megaseq.layers.initializers import Constant
from megaseq.layers.transformer import Decoder, Encoder
from megaseq.layers.units import UnitRun, encoder_decoder_units, flow_shapes, places_of
from megaseq.parallel.spec import Added, ParameterSpec, Ranks, Unit


class SoftmaxWeights(NamedTuple):
    """What turns hidden states [..., D] into logits: cap(scale * hidden W^T + bias)."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V], or None."""
    scale: float
    """Factor of the hidden states."""
    soft_cap: float | None
    """Logits become cap * tanh(logits / cap); None leaves them."""


class EncoderDecoder(Layer):
    """A Transformer of any of the families in `megaseq.layers.families`."""

    class Params(Layer.Params):
        model_dim: int = REQUIRED
        """Width D of both stacks, unless a stack sets its own."""
        source_vocab_size: int = FROM_PARENT
        """Tokens of the source; filled from the run's vocabulary."""
        target_vocab_size: int = FROM_PARENT
        """Tokens V of the target; filled from the run's vocabulary."""
        source_embedding: Embedding.Params = Embedding.Params()
        """Embedding of source tokens, and of target tokens unless these have their own."""
        target_embedding: Embedding.Params | None = None
        """Embedding of target tokens; None shares the source's."""
        head: Embedding.Params | None = None
        """The softmax's own matrix [V, D]; None shares that of the target tokens."""
        encoder: Encoder.Params = Encoder.Params()
        """Reads the source."""
        decoder: Decoder.Params = Decoder.Params()
        """Writes the target."""
        scale_output: bool = False
        """Whether hidden states are multiplied by D^-0.5 before the softmax (T5 v1.0)."""
        logits_bias: Literal["none", "buffer", "parameter"] = "none"
        """A bias [V] of the logits: none, fixed (BART, Marian) or trained."""
        logits_soft_cap: float | None = None
        """Logits become cap * tanh(logits / cap) (Gemma 2); None leaves them."""

        def validate(self) -> Iterator[str]:
            """Refuses matrices shared by sides that differ in width or vocabulary."""
            encoder_dim = self.model_dim if self.encoder.model_dim is FROM_PARENT else self.encoder.model_dim
            decoder_dim = self.model_dim if self.decoder.model_dim is FROM_PARENT else self.decoder.model_dim
            if self.target_embedding is None and encoder_dim != decoder_dim:
                yield (
                    f"target_embedding: must be set when decoder.model_dim ({decoder_dim}) is not "
                    f"encoder.model_dim ({encoder_dim}), but is None. Give the target its own embedding."
                )
            if self.target_embedding is None and self.source_vocab_size != self.target_vocab_size:
                yield (
                    f"target_embedding: must be set when target_vocab_size ({self.target_vocab_size}) is not "
                    f"source_vocab_size ({self.source_vocab_size}), but is None. Give the target its own embedding."
                )

    params: Params
    divisible = True

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        encoder = inherit(p.encoder, model_dim=p.model_dim)
        decoder = inherit(p.decoder, model_dim=p.model_dim, memory_dim=encoder.model_dim)
        self.source_embedding: Embedding = inherit(
            p.source_embedding, vocab_size=p.source_vocab_size, dim=encoder.model_dim
        ).instantiate()
        self.target_embedding: Embedding | None = None
        if p.target_embedding is not None:
            self.target_embedding = inherit(
                p.target_embedding, vocab_size=p.target_vocab_size, dim=decoder.model_dim
            ).instantiate()
        self.encoder: Encoder = encoder.instantiate()
        self.decoder: Decoder = decoder.instantiate()
        self.head: Embedding | None = None
        if p.head is not None:
            self.head = inherit(p.head, vocab_size=p.target_vocab_size, dim=decoder.model_dim).instantiate()
        self.output_scale = float(decoder.model_dim**-0.5) if p.scale_output else 1.0
        self.logits_bias: Tensor | nn.Parameter | None
        self._make_logits_bias()

    def _make_logits_bias(self) -> None:
        size = (self.softmax_matrix().shape[0],)
        if self.params.logits_bias == "parameter":
            self.create_parameter("logits_bias", shape=size, axes=("vocab",), init=Constant.Params().instantiate())
        elif self.params.logits_bias == "buffer":
            self.register_buffer("logits_bias", torch.zeros(size))
        else:
            self.logits_bias = None

    def softmax_matrix(self) -> Tensor:
        """Returns the matrix [V, D] of the softmax: the head's, or the embedding that it shares."""
        owner = self.head or self.target_embedding or self.source_embedding
        return owner.weight

    def embed_target(self, ids: Tensor) -> Tensor:
        """Returns the embeddings [..., D] of target tokens [...]."""
        owner = self.source_embedding if self.target_embedding is None else self.target_embedding
        out: Tensor = owner(ids)
        return out

    def encode(self, source: NestedMap) -> NestedMap:
        """Encodes a batch of sources.

        Args:
            source: `ids` [B, S]; `segment_ids` [B, S], 0 is padding (absent: none); `positions` [B, S], counting from 0
                in each segment (absent: derived); `row_segment_ids` where context ranks share the rows' tokens.

        Returns:
            `states` [B, S, E]; `segment_ids` [B, S] or None; `positions` [B or 1, S].
        """
        segment_ids, positions = places_of(source)
        x = self.source_embedding(source.ids)
        whole: Tensor | None = source.get("row_segment_ids")
        states = self.encoder(x, segment_ids=segment_ids, positions=positions, row_segment_ids=whole)
        return NestedMap(states=states, segment_ids=segment_ids, positions=positions, row_segment_ids=whole)

    def decode_hidden(self, target: NestedMap, *, memory: NestedMap) -> Tensor:
        """Runs the decoder over whole targets.

        Args:
            target: `ids` [B, T], the tokens before those to predict; `segment_ids` and `positions` as in `encode`.
            memory: what `encode` returned.

        Returns:
            Hidden states [B, T, D], of which `logits` makes the scores of the next tokens.
        """
        segment_ids, positions = places_of(target)
        hidden: Tensor = self.decoder(
            self.embed_target(target.ids),
            segment_ids=segment_ids,
            positions=positions,
            memory=memory.states,
            memory_segment_ids=memory.segment_ids,
            row_segment_ids=target.get("row_segment_ids"),
            memory_row_segment_ids=memory.get("row_segment_ids"),
        )
        return hidden

    def units(self) -> tuple[Unit, ...]:
        """Returns the pieces between which a pipeline may cut the model."""
        return encoder_decoder_units(self)

    def run_units(self, carry: Mapping[str, Tensor], *, batch: NestedMap, units: Sequence[Unit]) -> dict[str, Tensor]:
        """Runs consecutive `units` of a micro-batch; see `megaseq.parallel.spec.Pipelined`."""
        run, left = UnitRun(self, batch=batch), dict(carry)
        for unit in units:
            left = run.run(left, unit=unit)
        return left

    def begin_losses(self) -> None:
        """Lets layers note what they add to the loss; see `megaseq.parallel.spec.Pipelined`."""
        self.context.auxiliary = []

    def take_losses(self) -> Added | None:
        """Returns what layers have noted, summed; see `megaseq.parallel.spec.Pipelined`."""
        # Emptied, because a forward pass that is repeated in the backward pass adds nothing.
        taken, self.context.auxiliary = self.context.auxiliary, None
        return add_up(taken, loss_sum=taken[0].loss_sum.new_zeros(())) if taken else None

    def flow_shapes(self, batch: NestedMap) -> dict[str, tuple[int, int]]:
        """Returns (rows, tokens) of what travels between units; see `megaseq.parallel.spec.Pipelined`."""
        return flow_shapes(self, batch=batch)

    def softmax_weights(self) -> SoftmaxWeights:
        """Returns what a fused loss needs to go from hidden states to logits; of the tokens of `vocabulary_share`."""
        bias = self.logits_bias
        if bias is not None and not isinstance(bias, nn.Parameter) and self._shares_vocabulary is not None:
            start, stop = self._shares_vocabulary.span(self._num_classes)
            bias = bias[start:stop]  # a buffer is whole on every rank
        return SoftmaxWeights(self.softmax_matrix(), bias, self.output_scale, self.params.logits_soft_cap)

    @property
    def _shares_vocabulary(self) -> Ranks | None:
        """The tensor ranks, where they share the vocabulary."""
        return self.ranks if self.ranks is not None and "vocab" in self.ranks.divided else None

    @property
    def _num_classes(self) -> int:
        """Rows V of the whole softmax matrix."""
        spec: ParameterSpec = self.softmax_matrix().spec  # type: ignore[attr-defined]
        return spec.shape[0]

    def vocabulary_share(self) -> VocabularyShare | None:
        """Returns which target tokens `softmax_weights` are of, for a fused loss; None: all."""
        ranks = self._shares_vocabulary
        if ranks is None:
            return None
        size = self._num_classes
        return VocabularyShare(first=ranks.span(size)[0], size=size, total=ranks.total, maximum=ranks.maximum)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the scores [..., V] of the tokens after hidden states [..., D].

        Over tensor ranks it has no gradient: training goes through the fused loss.
        """
        weight, bias, scale, soft_cap = self.softmax_weights()
        logits = functional.linear(hidden if scale == 1.0 else hidden * scale, weight, bias)
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        ranks = self._shares_vocabulary
        return logits if ranks is None else ranks.gather(logits, length=self._num_classes, dim=-1)

    @torch.no_grad()
    def prefill(self, source: NestedMap) -> NestedMap:
        """Encodes sources, one a row; returns the state before the first `step`, described in `layers.decoding`."""
        return decoding.prefill(self.decoder, memory=self.encode(source))

    @torch.no_grad()
    def step(self, state: NestedMap, *, tokens: Tensor, need_attention: bool = False) -> tuple[Tensor, NestedMap]:
        """Feeds the last token of each hypothesis.

        Args:
            state: before; go on with the one that is returned.
            tokens: [B*K], the hypotheses of one source next to each other.
            need_attention: whether to leave `attention_probs` [B*K, S] in the state.

        Returns:
            Logits [B*K, V] of the next tokens, and the new state.
        """
        x = self.embed_target(tokens)
        hidden, state = decoding.step(self.decoder, state=state, x=x, need_attention=need_attention)
        return self.logits(hidden), state

    @torch.no_grad()
    def select(self, state: NestedMap, *, sources: Tensor, hyps: Tensor) -> NestedMap:
        """Keeps `sources` [B'] and, of each, the hypotheses `hyps` [B', K'] (0 to K-1); returns the new state."""
        return decoding.select(state, sources=sources, hyps=hyps)

    @torch.no_grad()
    def reorder(self, state: NestedMap, *, hyps: Tensor) -> NestedMap:
        """`select` of all sources, `hyps` [B, K'], which reads nothing back from the device."""
        return decoding.reorder(state, hyps=hyps)

    @torch.no_grad()
    def fix(self, state: NestedMap, *, num_hyps: int, num_tokens: int) -> tuple[NestedMap, int]:
        """Keeps the memory of the next steps in place, so that a CUDA graph can hold them; see `decoding.fix`."""
        return decoding.fix(self.decoder, state=state, num_hypotheses=num_hyps, num_tokens=num_tokens)
