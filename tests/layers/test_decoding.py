"""Decoding by steps: reordering, dropping sources, growing, and what is kept once for each source."""

from __future__ import annotations

import pytest
import torch

from megaseq.base import NestedMap, ParamsError
from megaseq.layers import EncoderDecoder
from tests.layers.test_packing import CHANGES, model_of


def sources(count: int, *, width: int = 7) -> NestedMap:
    """Returns random padded sources."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(4, 23, (count, width), generator=generator)
    lengths = torch.randint(2, width + 1, (count, 1), generator=generator)
    segment_ids = (torch.arange(width)[None] < lengths).long()
    return NestedMap(ids=ids * segment_ids, segment_ids=segment_ids)


@torch.no_grad()
def full(model: EncoderDecoder, *, source: NestedMap, row: int, tokens: list[int]) -> torch.Tensor:
    """Returns the logits [V] after `tokens` for one source, from the whole forward pass."""
    side = NestedMap(ids=source.ids[row : row + 1], segment_ids=source.segment_ids[row : row + 1])
    hidden = model.decode_hidden(NestedMap(ids=torch.tensor([tokens])), memory=model.encode(side))
    return model.logits(hidden)[0, -1]


@pytest.mark.parametrize(("native", "kernels"), [("1", "auto"), ("0", "auto"), ("0", "decode_attention=reference")])
@pytest.mark.parametrize("name", sorted(CHANGES))
def test_random_searches_are_the_full_forward(
    name: str, native: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random choices of sources and hypotheses, with the number of hypotheses changing; with either cache, and with
    keys looked up as on a GPU."""
    monkeypatch.setenv("MEGASEQ_NATIVE", native)
    monkeypatch.setenv("MEGASEQ_KERNELS", kernels)
    model = model_of(name)
    generator = torch.Generator().manual_seed(8)
    source = sources(4)
    state = model.prefill(source)
    rows, prefixes = [0, 1, 2, 3], [[[]], [[]], [[]], [[]]]  # type: ignore[var-annotated]
    for turn in range(12):
        width = len(prefixes[0])
        tokens = torch.randint(4, 23, (len(rows) * width,), generator=generator)
        for i in range(len(rows)):
            for k in range(width):
                prefixes[i][k] = [*prefixes[i][k], int(tokens[i * width + k])]
        logits, state = model.step(state, tokens=tokens)
        assert logits.shape == (len(rows) * width, 23)
        for i, row in enumerate(rows):
            for k in range(width):
                expected = full(model, source=source, row=row, tokens=prefixes[i][k])
                torch.testing.assert_close(logits[i * width + k], expected, rtol=1e-4, atol=1e-5)
        kept = [i for i in range(len(rows)) if turn not in (4, 7) or i != 1]
        hyps = torch.randint(0, width, (len(kept), 3 if turn < 8 else 2), generator=generator)
        if len(kept) == len(rows) and turn % 2:
            state = model.reorder(state, hyps=hyps)
        else:
            state = model.select(state, sources=torch.tensor(kept), hyps=hyps)
        rows = [rows[i] for i in kept]
        prefixes = [[prefixes[i][int(k)] for k in hyps[j]] for j, i in enumerate(kept)]


def test_memory_is_kept_once_for_each_source() -> None:
    model = model_of("sinusoidal")
    state = model.prefill(sources(2))
    _, state = model.step(state, tokens=torch.tensor([4, 5]))
    pointers = [tensor.data_ptr() for pair in state.memory for tensor in pair]
    state = model.select(state, sources=torch.tensor([0, 1]), hyps=torch.zeros(2, 5, dtype=torch.long))
    _, state = model.step(state, tokens=torch.arange(4, 14))
    assert [tensor.data_ptr() for pair in state.memory for tensor in pair] == pointers
    assert all(tensor.shape[0] == 2 for pair in state.memory for tensor in pair)


@torch.no_grad()
def test_buffers_grow_past_their_first_capacity() -> None:
    model = model_of("t5-shared")
    source = sources(1)
    tokens = torch.randint(4, 23, (1, 70), generator=torch.Generator().manual_seed(1))
    expected = model.logits(model.decode_hidden(NestedMap(ids=tokens), memory=model.encode(source)))
    state = model.prefill(source)
    for place in range(70):
        logits, state = model.step(state, tokens=tokens[:, place])
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-5)


def test_learned_positions_end_with_a_clear_error() -> None:
    model = model_of("learned")
    state = model.prefill(sources(1))
    with pytest.raises(ParamsError, match="max_positions: must cover the longest sequence, but is 16"):
        for _ in range(17):
            _, state = model.step(state, tokens=torch.tensor([4]))


def test_a_wrong_number_of_tokens_is_refused() -> None:
    model = model_of("sinusoidal")
    state = model.prefill(sources(2))
    with pytest.raises(ParamsError, match="must get one token for each of 2 hypotheses, but is 3"):
        model.step(state, tokens=torch.tensor([4, 5, 6]))


def test_attention_is_reported_when_asked_for() -> None:
    model = model_of("sinusoidal")
    source = sources(2)
    state = model.prefill(source)
    state = model.select(state, sources=torch.tensor([0, 1]), hyps=torch.zeros(2, 3, dtype=torch.long))
    logits, state = model.step(state, tokens=torch.arange(4, 10), need_attention=True)
    weights = state.attention_probs
    assert weights.shape == (6, 7)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert float(weights.view(2, 3, 7).amax(dim=1)[source.segment_ids == 0].sum()) == 0.0
    state = model.prefill(source)
    state = model.select(state, sources=torch.tensor([0, 1]), hyps=torch.zeros(2, 3, dtype=torch.long))
    plain, _ = model.step(state, tokens=torch.arange(4, 10))
    assert torch.equal(plain, logits)
