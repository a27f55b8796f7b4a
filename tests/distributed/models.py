"""Small models of every kind that a layout must divide, and the batches that they read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megaseq.base import NestedMap
from megaseq.layers import families
from megaseq.layers.attention import Attention, SelfAttention
from megaseq.layers.embedding import Embedding
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.layers.families import stacks, transformer
from megaseq.layers.norm import RMSNorm
from megaseq.layers.positions import SinusoidalPositions
from megaseq.layers.relative import Alibi
from megaseq.tasks.translation import Translation

SOURCE_VOCAB, TARGET_VOCAB = 41, 37
"""Numbers that nothing divides."""


def task_of(p: EncoderDecoder.Params) -> Translation.Params:
    """The task with this model, one vocabulary unless the target has its own embedding, and every term of the loss."""
    values = {name: getattr(p, name) for name in EncoderDecoder.Params.__annotations__}
    shared = p.target_embedding is None
    values["source_vocab_size"] = TARGET_VOCAB if shared else SOURCE_VOCAB
    values["target_vocab_size"] = TARGET_VOCAB
    return Translation.Params(**values, label_smoothing=0.1, z_loss=1e-3)


def _t5() -> EncoderDecoder.Params:
    return families.t5(model_dim=16, hidden_dim=24, num_heads=4, head_dim=6, num_layers=2)


def _umt5() -> EncoderDecoder.Params:
    return families.t5(version="umt5", model_dim=16, hidden_dim=24, num_heads=4, head_dim=6, num_layers=1)


def _t5_first() -> EncoderDecoder.Params:
    return families.t5(version="1.0", model_dim=16, hidden_dim=24, num_heads=4, head_dim=6, num_layers=1)


def _grouped() -> EncoderDecoder.Params:
    """One key head, which all ranks share, with norms of heads, biases and rotary positions."""
    p = families.t5gemma(
        model_dim=16, hidden_dim=24, num_heads=4, num_key_value_heads=1, head_dim=6, num_layers=2, window=3, dropout=0.1
    )
    for _, attention in p.find(Attention):
        attention.query_norm = attention.key_norm = RMSNorm.Params()
        attention.bias = True
    return p


def _two_key_heads() -> EncoderDecoder.Params:
    p = _grouped()
    for _, attention in p.find(Attention):
        attention.num_key_value_heads = 2
    return p


def _alibi() -> EncoderDecoder.Params:
    """ALiBi, and keys without biases."""
    p = transformer(model_dim=16, hidden_dim=24, num_heads=4, num_layers=2)
    p.encoder.positions = p.decoder.positions = None
    p.encoder.position_bias = p.decoder.position_bias = Alibi.Params()
    for _, attention in p.find(SelfAttention):
        attention.qkv.bias = (True, False, True)
    p.logits_bias = "parameter"
    return p


def _bart() -> EncoderDecoder.Params:
    return families.bart(model_dim=16, hidden_dim=24, num_heads=4, num_layers=2, max_positions=32)


def _widths() -> EncoderDecoder.Params:
    """A wide encoder, a narrow decoder with fewer heads, and vocabularies of their own."""
    sides = stacks(num_layers=2, num_heads=4, hidden_dim=24, dropout=0.1, positions=SinusoidalPositions.Params())
    p = EncoderDecoder.Params(model_dim=16, target_embedding=Embedding.Params(), **sides)
    p.encoder.model_dim = 24
    p.encoder.layer.self_attention.num_heads = 8
    return p


MODELS: dict[str, Callable[[], EncoderDecoder.Params]] = {
    "t5": _t5,
    "umt5": _umt5,
    "t5-1.0": _t5_first,
    "grouped": _grouped,
    "two_key_heads": _two_key_heads,
    "alibi": _alibi,
    "bart": _bart,
    "widths": _widths,
}


def batch_of(*, rows: int, source_length: int, target_length: int, packed: bool = True) -> NestedMap:
    """Random pairs, two in a row if `packed`, with padding at the ends."""
    generator = torch.Generator().manual_seed(rows * 100 + source_length * 10 + target_length)

    def side(length: int, vocab: int) -> NestedMap:
        cuts = torch.randint(1, length - 1, (rows, 1), generator=generator)
        places = torch.arange(length).expand(rows, length)
        segment_ids = (1 + (places >= cuts).long()) if packed else torch.ones_like(places)
        segment_ids = torch.where(places < length - torch.arange(rows)[:, None] % 2, segment_ids, 0)
        starts = torch.where(segment_ids == 2, cuts, 0)
        ids = torch.randint(4, vocab, (rows, length), generator=generator) * (segment_ids > 0)
        return NestedMap(ids=ids, segment_ids=segment_ids, positions=(places - starts) * (segment_ids > 0))

    source, target = side(source_length, TARGET_VOCAB), side(target_length, TARGET_VOCAB)
    target.weights = (target.segment_ids > 0).float()
    target.labels = (target.ids * 7 + 3) % TARGET_VOCAB * (target.segment_ids > 0)
    return NestedMap(source=source, target=target)
