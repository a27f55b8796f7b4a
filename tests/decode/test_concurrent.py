"""Several batches decoded at once: the same results as one after the other, and nothing left behind."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch
from megaseq.decode.concurrent import default_workers, map_concurrently
from megaseq.layers import families
from megaseq.layers.encoder_decoder import EncoderDecoder


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_items() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    for workers in (1, 2, 5):
        assert map_concurrently(work, items=range(20), workers=workers) == [item * item for item in range(20)]
    assert map_concurrently(work, items=[], workers=3) == []


def test_two_run_at_once_each_with_its_share_of_the_threads() -> None:
    meet = threading.Barrier(2, timeout=10)

    def work(item: int) -> int:
        meet.wait()  # Fails unless two are here together.
        return torch.get_num_threads()

    assert map_concurrently(work, items=range(4), workers=2) == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_workers_have_the_modes_of_the_caller() -> None:
    def work(item: int) -> tuple[bool, bool, bool, torch.dtype]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return (
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), product.dtype
        )  # fmt: skip

    assert map_concurrently(work, items=range(2), workers=2) == [(False, True, False, torch.float32)] * 2
    with torch.no_grad():
        assert map_concurrently(work, items=range(2), workers=2) == [(False, False, False, torch.float32)] * 2
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert map_concurrently(work, items=range(2), workers=2) == [(True, False, True, torch.bfloat16)] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work_and_reaches_the_caller(workers: int) -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.001)
        if item == 3:
            raise KeyError(item)

    with pytest.raises(KeyError):
        map_concurrently(work, items=range(100), workers=workers)
    assert max(begun) < 10
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_end_it_leaves_the_rest(workers: int) -> None:
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item

    results = map_concurrently(work, items=range(50), workers=workers, keep_going=lambda: len(done) < 5)
    assert 5 <= len(done) <= 6
    assert [item for item in results if item is not None] == sorted(done)


def test_one_worker_beside_other_ranks_or_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(torch.device("cpu")) == 2
    assert default_workers(torch.device("cuda")) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert default_workers(torch.device("cpu")) == 1


def test_batches_decoded_at_once_give_what_each_gives_alone() -> None:
    p = families.marian(model_dim=32, hidden_dim=64, num_heads=2, num_layers=2, dropout=0.0)
    model: EncoderDecoder = p.replace(source_vocab_size=50, target_vocab_size=50).instantiate()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.eval()
    batches = [
        NestedMap(ids=torch.randint(4, 50, (size, length), generator=generator))
        for size, length in ((3, 9), (5, 7), (1, 4), (6, 2), (4, 11), (2, 5))
    ]
    search: BeamSearch = BeamSearch.Params(num_hyps_per_beam=4, target_seq_len=12, num_best=4).instantiate()

    def decode(batch: NestedMap) -> list[list[tuple[int, ...]]]:
        return [[hypothesis.ids for hypothesis in best] for best in search.search(model, source=batch)]

    alone = [decode(batch) for batch in batches]
    for _ in range(5):
        assert map_concurrently(decode, items=batches, workers=4) == alone
