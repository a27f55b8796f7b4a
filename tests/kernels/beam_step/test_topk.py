"""Top-k with ties against a stable sort."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from megaseq.kernels.beam_step.topk import merged_topk, ordered_keys, row_topk


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(1, 3000), k=st.integers(1, 9), values=st.sampled_from([2, 50, 10**6])
)
def test_row_topk_is_a_stable_sort(seed: int, vocab: int, k: int, values: int) -> None:
    """Values as torch sorts them; among equals the lower ids, with few distinct values and with many."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(values, (3, vocab), generator=generator).float() / 7 - 1
    scores[0, torch.randint(vocab, (vocab // 3,), generator=generator)] = float("-inf")
    got, ids = row_topk(scores, k=k)
    wanted, order = scores.sort(dim=-1, descending=True, stable=True)
    k = min(k, vocab)
    assert torch.equal(got, wanted[:, :k]) and torch.equal(scores.gather(-1, ids), got)
    finite = wanted[:, :k] > float("-inf")
    assert torch.equal(ids.sort(-1).values[finite.all(-1)], order[:, :k].sort(-1).values[finite.all(-1)])


def test_keys_order_all_floats() -> None:
    """Infinities, negative numbers, zeros of both signs; ranks break ties."""
    scores = torch.tensor([float("-inf"), -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, float("inf")])
    keys = ordered_keys(scores, ranks=torch.zeros(10, dtype=torch.long))
    assert torch.equal(keys.sort().values, keys) and keys[4] == keys[5] and keys.unique().numel() == 9
    ranks = torch.tensor([[5, 2**32 - 1, 0, 3]])
    assert merged_topk(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), ranks=ranks, k=4).tolist() == [[3, 2, 0, 1]]
