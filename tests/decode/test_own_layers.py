"""Beam search over megaseq's own layers equals transformers' generate over its, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch, GreedySearch, Sampler, beam_search, greedy_search, sample
from megaseq.layers import families
from megaseq.layers.encoder_decoder import EncoderDecoder
from tests.parity import mapping

from .hugging_face import EOS, PAD, VOCAB, random_sources, tiny_marian
from .test_transformers_equality import STEPS, generated, params, trimmed


def both(seed: int) -> tuple[Any, EncoderDecoder]:
    """The same tiny Marian twice."""
    theirs = tiny_marian(seed)
    shape = dict(model_dim=16, hidden_dim=32, num_heads=2, num_layers=1, num_decoder_layers=2, dropout=0.0)
    p = families.marian(**shape).replace(source_vocab_size=VOCAB, target_vocab_size=VOCAB)
    p.source_embedding.scale_by_sqrt_dim = theirs.config.scale_embedding
    for stack in (p.encoder, p.decoder):
        stack.layer.ffn.activation = "gelu"
    ours: EncoderDecoder = p.instantiate()
    mapping.load(ours, weights=mapping.bart(theirs))
    return theirs, ours.eval()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_beam_search(seed: int, early_stopping: bool) -> None:
    """Outputs and scores of all hypotheses, with the cache reordered and sources leaving."""
    (theirs, ours), source = both(seed), random_sources(seed, count=7)
    settings = {"early_stopping": early_stopping}
    wanted, scores = generated(theirs, source, num_beams=4, num_return_sequences=4, **settings)
    got = [hyp for hyps in beam_search(ours, source=source, params=params(4, **settings)) for hyp in hyps]
    assert [hyp.ids for hyp in got] == [trimmed(w, g.ids) for w, g in zip(wanted, got, strict=True)]
    torch.testing.assert_close(torch.tensor([hyp.score for hyp in got]), torch.tensor(scores), rtol=1e-4, atol=1e-4)


def test_greedy_search() -> None:
    """The same outputs."""
    (theirs, ours), source = both(4), random_sources(4, count=7)
    wanted, _ = generated(theirs, source, num_beams=1)
    p = GreedySearch.Params(target_sos_id=PAD, target_eos_id=EOS, target_seq_len=STEPS)
    got = [hyps[0].ids for hyps in greedy_search(ours, source=source, params=p)]
    assert [trimmed(ids, like) for ids, like in zip(wanted, got, strict=True)] == got


def test_scores_are_those_of_the_whole_forward_pass() -> None:
    """The log-probability of every hypothesis is what the model gives when it reads it at once; with coverage, too."""
    _, ours = both(5)
    source = random_sources(5, count=4)
    options: dict[str, Any] = dict(target_sos_id=PAD, target_eos_id=EOS, target_seq_len=STEPS, num_hyps_per_beam=4)
    beam = BeamSearch.Params(**options, num_best=4, coverage_penalty=0.2, beam_size=9.0)
    drawn = Sampler.Params(target_sos_id=PAD, target_eos_id=EOS, target_seq_len=STEPS, num_samples=3)
    for found in (
        beam_search(ours, source=source, params=beam),
        sample(ours, source=source, params=drawn),
    ):
        for row, hyps in enumerate(found):
            alone = NestedMap(ids=source.ids[row : row + 1], segment_ids=source.segment_ids[row : row + 1])
            for hyp in hyps:
                labels = [*hyp.ids, EOS] if hyp.ended else list(hyp.ids)
                fed = NestedMap(ids=torch.tensor([[PAD, *labels[:-1]]]))
                with torch.no_grad():
                    logits = ours.logits(ours.decode_hidden(fed, memory=ours.encode(alone)))
                logprobs = logits.log_softmax(-1)[0].gather(1, torch.tensor(labels).unsqueeze(1))
                assert float(logprobs.sum()) == pytest.approx(hyp.logprob, abs=1e-3)
