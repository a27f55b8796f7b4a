"""Tiny random encoder-decoder models of transformers, and their view as a `StepDecoder`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from megaseq.base import NestedMap

VOCAB, EOS, PAD = 23, 1, 0


def tiny_t5(seed: int, *, sharpness: float = 3.0) -> T5ForConditionalGeneration:
    """A random T5 whose outputs end at various lengths."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS, dropout_rate=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(std=0.35)
        model.lm_head.weight.mul_(sharpness)
    return model


def tiny_marian(seed: int) -> MarianMTModel:
    """A random Marian whose outputs end at various lengths."""
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD, dropout=0.0, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:
                parameter.normal_(std=0.4)
    model.generation_config.bad_words_ids = None
    model.generation_config.forced_eos_token_id = None
    return model


class HuggingFaceDecoder:
    """A transformers model as a `StepDecoder`: keys and values per hypothesis, encoder states per source."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, source: NestedMap) -> NestedMap:
        """Encodes."""
        mask = source.segment_ids > 0
        states = self.model.get_encoder()(input_ids=source.ids, attention_mask=mask).last_hidden_state
        return NestedMap(states=states, mask=mask, history=torch.zeros(states.shape[0], 1, 0, dtype=torch.long))

    def step(
        self, state: NestedMap, *, tokens: torch.Tensor, need_attention: bool = False
    ) -> tuple[torch.Tensor, NestedMap]:
        """Recomputes the whole prefix: slow, and plainly right."""
        batch, num_hyps, _ = state.history.shape
        history = torch.cat([state.history, tokens.view(batch, num_hyps, 1)], dim=-1)
        output = self.model(
            encoder_outputs=BaseModelOutput(state.states.repeat_interleave(num_hyps, 0)),
            attention_mask=state.mask.repeat_interleave(num_hyps, 0),
            decoder_input_ids=history.view(batch * num_hyps, -1),
            use_cache=False,
        )
        return output.logits[:, -1], NestedMap(states=state.states, mask=state.mask, history=history)

    def select(self, state: NestedMap, *, sources: torch.Tensor, hyps: torch.Tensor) -> NestedMap:
        """Reorders prefixes, drops sources."""
        history = state.history[sources]
        history = history.gather(1, hyps.unsqueeze(-1).expand(-1, -1, history.shape[-1]))
        return NestedMap(states=state.states[sources], mask=state.mask[sources], history=history)


def random_sources(seed: int, *, count: int = 5) -> NestedMap:
    """Sources of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (count,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.randint(2, VOCAB, mask.shape, generator=generator).masked_fill(~mask, PAD)
    return NestedMap(ids=ids, segment_ids=mask.long(), positions=torch.arange(mask.shape[1]).expand_as(ids))
