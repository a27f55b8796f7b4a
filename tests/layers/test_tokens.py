"""Parts of an activation know where they stand in the whole."""

from __future__ import annotations

import torch

from megaseq.kernels.dropout import DropoutMask, Start, dropout
from megaseq.layers.tokens import Tokens, starts, starts_of_weights

KEY = (3, 1, 4)


def masked(values: torch.Tensor, offset: Start) -> torch.Tensor:
    return dropout(values, rate=0.5, key=KEY, offset=offset)


def test_parts_of_an_activation_have_the_masks_of_the_whole() -> None:
    x = torch.rand(6, 5, 8) + 1.0
    whole = masked(x, starts(x, tokens=Tokens(length=5)))
    own = Tokens(length=5, row_start=2, row_stride=2)
    cases = [
        (slice(3, None), slice(None), slice(None), Tokens(length=5, row_start=3), None),
        (slice(2, None, 2), slice(None), slice(None), own, None),
        (slice(2, None, 2), slice(1, 4), slice(None), own.part(start=1, length=3), None),
        (slice(2, None, 2), slice(None), slice(4, 6), own, (4, 8)),
        (slice(2, None, 2), slice(3, 5), slice(0, 4), own.part(start=3, length=2), (0, 8)),
    ]
    for rows, tokens, columns, place, of_columns in cases:
        part = x[rows, tokens, columns]
        assert torch.equal(masked(part, starts(part, tokens=place, columns=of_columns)), whole[rows, tokens, columns])


def test_tokens_that_are_no_neighbours() -> None:
    x = torch.rand(2, 8, 4) + 1.0
    whole = masked(x, starts(x, tokens=Tokens(length=8)))
    places = torch.tensor([0, 1, 6, 7])
    tokens = Tokens(length=8, places=places)
    assert torch.equal(masked(x[:, places], starts(x[:, places], tokens=tokens)), whole[:, places])
    half = tokens.part(start=2, length=2)
    assert half.divided and torch.equal(masked(x[:, 6:], starts(x[:, 6:], tokens=half)), whole[:, 6:])


def test_heads_have_the_masks_of_all_heads() -> None:
    weights = torch.rand(4, 6, 3, 5) + 1.0
    device = weights.device
    whole = masked(
        weights, starts_of_weights(tokens=Tokens(3), batch=4, heads=(0, 6, 6), lengths=(3, 5), device=device)
    )
    tokens = Tokens(3, row_start=1, row_stride=2)
    offset = starts_of_weights(tokens=tokens, batch=2, heads=(2, 2, 6), lengths=(3, 5), device=device)
    part = weights[1::2, 2:4]
    assert torch.equal(masked(part, DropoutMask(0.5, KEY, offset).offset), whole[1::2, 2:4])


def test_one_run_stays_one_number() -> None:
    """The common case needs no tensor."""
    x = torch.zeros(3, 5, 4)
    assert starts(x, tokens=Tokens(length=5, row_start=2)) == 40
    assert starts(x[:1], tokens=Tokens(length=5, row_start=2, row_stride=7)) == 40
