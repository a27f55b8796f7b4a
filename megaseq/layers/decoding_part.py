"""The part of an encoder-decoder's token-by-token decoding that a run of its units does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from megaseq.base import NestedMap
from megaseq.layers import decoding
from megaseq.layers.norm import Norm
from megaseq.layers.positions import Positions
from megaseq.layers.relative import PositionBias
from megaseq.parallel.spec import Unit

if TYPE_CHECKING:
    from megaseq.layers.encoder_decoder import EncoderDecoder


class DecodingPart:
    """Some layers of a decoder, perhaps with the target's embedding before them and the logits behind them."""

    def __init__(self, model: EncoderDecoder, *, units: Sequence[Unit]) -> None:
        names = [unit.name for unit in units if unit.name.startswith("decoder.")]
        self._model = model
        self.begins = "decoder.start" in names
        """Whether it reads tokens, and not hidden states."""
        self.ends = "decoder.finish" in names
        """Whether it gives logits, and not hidden states."""
        indices = [int(name.removeprefix("decoder.layers.")) for name in names if ".layers." in name]
        self.has_last_layer = len(model.decoder.layers) - 1 in indices
        """Whether the attention that a step reports is known here."""
        self._stack = _Layers(model, indices=indices, begins=self.begins, ends=self.ends)

    @property
    def width(self) -> int:
        """D, of hidden states."""
        return self._model.decoder.params.model_dim

    def prefill(self, memory: NestedMap) -> NestedMap:
        """Returns the state of these layers before the first step; see `decoding.prefill`."""
        return decoding.prefill(self._stack, memory=memory)

    def step(self, state: NestedMap, *, x: Tensor, need_attention: bool = False) -> tuple[Tensor, NestedMap]:
        """Runs one token of every hypothesis through these layers.

        Args:
            state: of these layers.
            x: tokens [B*K] where `begins`, else hidden states [B*K, D].
            need_attention: whether the part with the last layer leaves `attention_probs` in the state.

        Returns:
            Logits [B*K, V] where `ends`, else hidden states [B*K, D], and the new state.
        """
        if self.begins:
            x = self._model.embed_target(x)
        hidden, state = decoding.step(
            self._stack, state=state, x=x, need_attention=need_attention and self.has_last_layer
        )
        return (self._model.logits(hidden) if self.ends else hidden), state

    def select(self, state: NestedMap, *, sources: Tensor, hyps: Tensor) -> NestedMap:
        """Keeps some sources and hypotheses; see `decoding.select`."""
        return decoding.select(state, sources=sources, hyps=hyps)


class _Layers:
    """A run of a decoder's layers that `decoding` takes for a decoder."""

    def __init__(self, model: EncoderDecoder, *, indices: Sequence[int], begins: bool, ends: bool) -> None:
        decoder = model.decoder
        self.layers: Sequence[nn.Module] = [decoder.layers[index] for index in indices]
        self.positions: Positions | None = decoder.positions if begins else None
        self.input_norm: Norm | None = decoder.input_norm if begins else None
        self.position_bias: PositionBias | None = decoder.position_bias if indices else None
        self._decoder = decoder if ends else None

    def finish(self, x: Tensor) -> Tensor:
        """Returns the decoder's output at its end, elsewhere `x`."""
        return x if self._decoder is None else self._decoder.finish(x)
