"""Work on evaluation inputs, shared by data ranks: whole, without a rank that waits for another."""

from __future__ import annotations

from typing import Any

from megaseq.parallel.layout import Layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.process import current_team
from megaseq.train.spread import ALONE, Spread
from tests.distributed.harness import run_ranks


def test_one_process_has_all_the_work() -> None:
    assert ALONE.deal([1, 2, 3]) == [1, 2, 3]
    assert ALONE.collect({1: [("a", 0.0, 0.0)]}) == {1: [("a", 0.0, 0.0)]}
    assert ALONE.add_up({"loss": (1.0, 2.0)}) == {"loss": (1.0, 2.0)}


def _work(rank: int, layout: Layout) -> dict[str, Any]:
    spread = Spread(mesh=Mesh(layout, rank=rank), team=current_team())
    own = spread.deal([0, 1, 2, 3, 4])
    found = {item: [(f"text {item}", -0.5 * item, float("-inf"))] for item in own if item is not None}
    return {
        "own": own,
        "found": spread.collect(found),
        "sums": spread.add_up({"loss": (float(rank), 1.0), "nll": (1.0, 2.0)}),
        "shared": spread.share({"bleu": 10.0 + rank}),
    }


ALL = {item: [(f"text {item}", -0.5 * item, float("-inf"))] for item in range(5)}


def test_data_ranks_share_batches_and_the_first_has_all_results() -> None:
    ranks = run_ranks(_work, world_size=2, arguments=(Layout(data=2),))
    assert [row["own"] for row in ranks] == [[0, 2, 4], [1, 3, None]]
    assert [row["found"] for row in ranks] == [ALL, {}]
    for row in ranks:
        assert row["sums"] == {"loss": (1.0, 2.0), "nll": (2.0, 4.0)}
        assert row["shared"] == {"bleu": 10.0}


def test_tensor_ranks_do_the_same_work() -> None:
    ranks = run_ranks(_work, world_size=4, arguments=(Layout(data=2, tensor=2),))
    assert [row["own"] for row in ranks] == [[0, 2, 4], [0, 2, 4], [1, 3, None], [1, 3, None]]
    assert [row["found"] for row in ranks] == [ALL, {}, {}, {}]
    assert [row["sums"]["loss"] for row in ranks] == [(2.0, 2.0), (4.0, 2.0)] * 2
