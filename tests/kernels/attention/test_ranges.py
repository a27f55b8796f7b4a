"""The ranges of keys that kernels visit: all that is seen is in them, and packed rows cost what their segments do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.kernels.attention import AttentionMask
from megaseq.kernels.attention.ranges import GRANULE, SegmentRanges, segment_ranges

NEVER = 1 << 30


def packed(lengths: list[int], *, padding: int) -> Tensor:
    """Ids [1, L] of one row."""
    ids = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return torch.tensor([[*ids, *[0] * padding]])


def check_ranges(found: Tensor, *, own: Tensor, others: Tensor) -> None:
    """Whether a granule's first range holds all that its tokens see, and all see all of the second."""
    for row in range(own.shape[0]):
        for granule in range(found.shape[1]):
            ids = own[row, granule * GRANULE : (granule + 1) * GRANULE]
            start, stop, whole, whole_stop = found[row, granule].tolist()
            seen = (ids[:, None] == others[row]) & (ids != 0)[:, None]
            places = seen.any(dim=0).nonzero().flatten().tolist()
            assert all(start <= place < stop for place in places)
            assert bool(seen[:, whole : max(whole, whole_stop)].all())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sorted_ids=st.booleans())
def test_ranges_hold_what_is_seen(data: st.DataObject, sorted_ids: bool) -> None:
    batch = data.draw(st.integers(1, 2))
    sides = []
    for _ in range(2):
        rows = []
        length = data.draw(st.integers(1, 150))
        for _ in range(batch):
            ids: list[int] = []
            while len(ids) < length:
                ids += [data.draw(st.integers(0, 4))] * data.draw(st.integers(1, 70))
            rows.append(sorted(ids[:length], key=lambda n: n or 9) if sorted_ids else ids[:length])
        sides.append(torch.tensor(rows))
    ranges = segment_ranges(sides[0], key_ids=sides[1])
    check_ranges(ranges.key_ranges, own=sides[0], others=sides[1])
    check_ranges(ranges.query_ranges, own=sides[1], others=sides[0])


def test_ranges_of_rising_ids_are_tight() -> None:
    ids = packed([70, 20, 100], padding=34)
    ranges = segment_ranges(ids, key_ids=ids)
    # Granules of 32: 1 1 | 12 | 3 ... of tokens 0-69, 70-89, 90-189, and padding from 190 on.
    assert ranges.key_ranges[0].tolist() == [
        [0, 96, 0, 64],
        [0, 96, 0, 64],
        [0, 192, 0, 0],
        [64, 192, 96, 160],
        [64, 192, 96, 160],
        [64, 192, 0, 0],
        [224, 0, 0, 0],
    ]


def test_a_mask_computes_its_ranges_once() -> None:
    ids = packed([5, 6], padding=1)
    mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids)
    assert mask.ranges(query_length=12, key_length=12) is mask.ranges(query_length=12, key_length=12)
    assert AttentionMask(causal=True).ranges(query_length=12, key_length=12) is None
    one_sided = AttentionMask(key_segment_ids=ids).ranges(query_length=3, key_length=12)
    assert one_sided is not None and one_sided.query_ids.tolist() == [[1, 1, 1]]
    assert one_sided.key_ids.tolist() == [[1] * 11 + [0]]


def visits(
    ranges: SegmentRanges | None, *, lengths: tuple[int, int], band: tuple[int, int], tile: int, device: torch.device
) -> Tensor:
    """How many tiles of keys each tile of queries visits by the kernels' function: [tiles, (whole ones, others)]."""
    from tests.kernels.attention.visits import count_visits

    tiles = -(-lengths[0] // tile)
    found = torch.zeros(tiles, 2, dtype=torch.int32, device=device)
    moved = None if ranges is None else ranges.key_ranges.to(device)
    low, high = band
    count_visits[(tiles,)](
        found, moved, lengths[0], lengths[1], lengths[1] - lengths[0], low, high, BLOCK=tile, GRANULE=GRANULE
    )
    return found.cpu()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_cost_of_packed_rows_follows_their_segments(count: int, device: torch.device) -> None:
    length, tile = 2048, 64
    for lengths in ([length // count] * count, [length // count + 30 * (-1) ** n for n in range(count)]):
        ids = packed(lengths, padding=length - sum(lengths))
        ranges = segment_ranges(ids, key_ids=ids)
        found = visits(ranges, lengths=(length, length), band=(-NEVER, NEVER), tile=tile, device=device)
        # From the keys' side, as the kernel for their gradients asks, it is the same.
        assert torch.equal(ranges.key_ranges, ranges.query_ranges)
        alone = sum((-(-segment // tile)) ** 2 for segment in lengths)
        # At each end of a segment a tile may be shared with its neighbour.
        assert alone / 1.1 <= found.sum() <= alone + 4 * count * (length // count // tile + 2)
        exact = all(segment % tile == 0 for segment in lengths)
        assert found.sum() == alone or not exact
        # Where segments end with tiles, no tile needs its ids compared.
        assert found[:, 1].sum() == 0 or not exact


def test_padding_costs_nothing(device: torch.device) -> None:
    ids = packed([128], padding=384)
    found = visits(segment_ranges(ids, key_ids=ids), lengths=(512, 512), band=(-NEVER, NEVER), tile=64, device=device)
    assert found.tolist() == [[2, 0]] * 2 + [[0, 0]] * 6


def test_causal_and_window_visit_the_band(device: torch.device) -> None:
    causal = visits(None, lengths=(256, 256), band=(-NEVER, 0), tile=64, device=device)
    assert causal.tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]
    window = visits(None, lengths=(512, 512), band=(-63, 63), tile=64, device=device)
    assert window.sum(dim=1).tolist() == [2, 3, 3, 3, 3, 3, 3, 2]
    wide = visits(None, lengths=(512, 512), band=(-127, 127), tile=64, device=device)
    assert wide[3].tolist() == [3, 2]
    shorter = visits(None, lengths=(64, 256), band=(-NEVER, 0), tile=64, device=device)
    assert shorter.tolist() == [[3, 1]]
