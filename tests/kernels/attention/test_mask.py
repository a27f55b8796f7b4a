"""AttentionMask: what it hides, what it keeps, which shortcut it finds."""

from __future__ import annotations

import pytest
import torch

from megaseq.kernels.attention import AttentionMask, attention, attention_with_log_sum
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dropout import DropoutMask

CPU = torch.device("cpu")


def test_allowed_by_segments_and_order() -> None:
    ids = torch.tensor([[1, 1, 2, 0]])
    mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True)
    allowed = mask.allowed(query_length=4, key_length=4, device=CPU)
    assert allowed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_one_sided_segment_ids_mark_padding() -> None:
    mask = AttentionMask(key_segment_ids=torch.tensor([[1, 2, 0]]))
    assert mask.allowed(query_length=2, key_length=3, device=CPU)[0, 0].int().tolist() == [[1, 1, 0]] * 2


def test_positions_decide_order_where_given() -> None:
    mask = AttentionMask(
        query_positions=torch.tensor([[4]]), key_positions=torch.tensor([[3, 4, 5]]), causal=True, window=2
    )
    assert mask.allowed(query_length=1, key_length=3, device=CPU)[0, 0].int().tolist() == [[1, 1, 0]]


def test_without_positions_the_last_query_stands_at_the_last_key() -> None:
    allowed = AttentionMask(causal=True).allowed(query_length=2, key_length=4, device=CPU)
    assert allowed[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_additive_is_made_once_for_each_dtype() -> None:
    mask = AttentionMask(key_segment_ids=torch.tensor([[1, 0]]))
    first = mask.additive(torch.float32, query_length=2, key_length=2, device=CPU)
    assert first is mask.additive(torch.float32, query_length=2, key_length=2, device=CPU)
    assert mask.additive(torch.bfloat16, query_length=2, key_length=2, device=CPU).dtype is torch.bfloat16
    assert first[0, 0].tolist() == [[0.0, float("-inf")]] * 2


ONES = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (AttentionMask(), "full"),
        (AttentionMask(query_segment_ids=ONES, key_segment_ids=ONES), "full"),
        (AttentionMask(query_segment_ids=ONES, key_segment_ids=ONES, causal=True), "causal"),
        (AttentionMask(query_segment_ids=ONES, key_segment_ids=2 * ONES), None),
        (AttentionMask(key_segment_ids=torch.tensor([[1, 1, 2, 2]] * 2)), "full"),
        (AttentionMask(key_segment_ids=torch.tensor([[1, 1, 1, 0]] * 2)), None),
        (AttentionMask(causal=True, window=4), "causal"),
        (AttentionMask(causal=True, window=3), None),
        (AttentionMask(window=4), "full"),
        (AttentionMask(causal=True, query_positions=torch.arange(4)[None]), "causal"),
        (AttentionMask(causal=True, query_positions=torch.arange(4).flip(0)[None]), None),
    ],
)
def test_shortcut(mask: AttentionMask, expected: str | None) -> None:
    assert mask.shortcut(query_length=4, key_length=4) == expected
    allowed = mask.allowed(query_length=4, key_length=4, device=CPU).expand(-1, 1, 4, 4)
    truth = {"full": torch.ones(4, 4, dtype=torch.bool), "causal": torch.ones(4, 4, dtype=torch.bool).tril()}
    for name, triangle in truth.items():
        assert (name == expected) <= bool((allowed == triangle).all())


def test_plan_refuses_segments_in_pieces_and_strange_positions() -> None:
    pieces = torch.tensor([[1, 2, 1]])
    assert AttentionMask(query_segment_ids=pieces, key_segment_ids=pieces).plan() is None
    ids = torch.tensor([[1, 1, 2]])
    backwards = torch.tensor([[1, 0, 0]])
    mask = AttentionMask(
        query_segment_ids=ids, key_segment_ids=ids, query_positions=backwards, key_positions=backwards, causal=True
    )
    assert mask.plan() is None
    good = torch.tensor([[0, 1, 0]])
    mask = AttentionMask(
        query_segment_ids=ids, key_segment_ids=ids, query_positions=good, key_positions=good, causal=True
    )
    assert mask.plan() is not None


def test_bad_arguments() -> None:
    with pytest.raises(KernelError, match="window must be at least 1, but is 0"):
        AttentionMask(window=0)
    with pytest.raises(KernelError, match=r"attention mask: key_segment_ids must be integers, but is torch\.float32"):
        AttentionMask(key_segment_ids=torch.ones(2, 3))
    with pytest.raises(KernelError, match=r"key_segment_ids must have shape \[B, length\]"):
        AttentionMask(key_segment_ids=torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["query_segment_ids", "key_segment_ids", "query_positions", "key_positions"])
def test_a_mask_of_another_device_is_an_error(name: str) -> None:
    there = torch.zeros(1, 3, 2, 8, device="meta")
    mask = AttentionMask(**{name: torch.ones(1, 3, dtype=torch.int32)})
    for op in (attention, attention_with_log_sum):
        with pytest.raises(
            KernelError, match=f"attention: mask.{name} must be on the device of query, meta, but is cpu"
        ):
            op(there, key=there, value=there, mask=mask)


def test_what_else_is_on_another_device_is_an_error() -> None:
    there = torch.zeros(1, 3, 2, 8, device="meta")
    with pytest.raises(KernelError, match="attention: bias must be on the device of query"):
        attention(there, key=there, value=there, bias=torch.zeros(1, 2, 3, 3))
    runs = DropoutMask(0.1, (1, 2, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(KernelError, match=r"attention: dropout.offset must be on the device of query"):
        attention(there, key=there, value=there, dropout=runs)
