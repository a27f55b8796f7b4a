"""Evaluation and decoding through a pipeline give what one process gives, whatever the lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base import Configurable, NestedMap
from megaseq.decode import BeamSearch, GreedySearch, Sampler
from megaseq.parallel.pipeline.links import Links

from .harness import run_ranks
from .parity import Case, make_engine, packed_batch

Found = list[list[tuple[tuple[int, ...], float]]]


def _sources(rows: int) -> NestedMap:
    """One text a row, the first of one token and the last of eleven."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.linspace(1, 11, rows).long().unsqueeze(1)
    places = torch.arange(11).expand(rows, 11)
    ids = torch.randint(4, 64, (rows, 11), generator=generator)
    return NestedMap(ids=ids * (places < lengths), segment_ids=(places < lengths).long(), positions=places)


SEARCHES: dict[str, Configurable.Params] = {
    # The limits are of each source, so that they end at very different steps.
    "beam": BeamSearch.Params(num_hyps_per_beam=3, target_seq_len=24, max_length_ratio=2.0, coverage_penalty=0.1),
    "plain beam": BeamSearch.Params(num_hyps_per_beam=3, target_seq_len=24, max_length_ratio=2.0),
    "masked beam": BeamSearch.Params(num_hyps_per_beam=2, target_seq_len=12, device_loop=True, device_loop_steps=4),
    "greedy": GreedySearch.Params(target_seq_len=24, max_length_ratio=2.0),
    "sampling": Sampler.Params(target_seq_len=20, max_length_ratio=1.5),
}


def _decode_rank(rank: int, parallel: dict[str, Any]) -> tuple[int, float, dict[str, Found]]:
    """Returns the data rank, the loss of a batch, and what this rank's sources became."""
    torch.set_flush_denormal(True)
    changes = {"decoder.num_layers": 3, "encoder.num_layers": 2}
    engine = make_engine(Case(parallel=parallel, task=changes), rank=rank)
    data_rank, data_ranks = (0, 1) if engine.mesh is None else (engine.mesh.index("data"), engine.mesh.size("data"))
    found: dict[str, Found] = {}
    # A step first, so that nothing of it is left over in what evaluates.
    engine.train_step(packed_batch(0).transform(lambda t: t[data_rank::data_ranks]), step=0)
    with engine.evaluating() as task:
        output = task.compute_loss(packed_batch(1))
        for name, search in SEARCHES.items():
            # Data ranks have other sources, and one of them more of these.
            rows = slice(0, 7) if data_ranks == 1 else (slice(0, 2), slice(2, 7))[data_rank]
            keys = torch.arange(7)[rows]
            hypotheses = task.decode(_sources(7).transform(lambda t, r=rows: t[r]), search=search, keys=keys)  # type: ignore[misc]
            found[name] = [[(h.ids, round(h.score, 4)) for h in best] for best in hypotheses]
    engine.train_step(packed_batch(0).transform(lambda t: t[data_rank::data_ranks]), step=1)
    return data_rank, float(output.loss_sum / output.weight), found


def _traffic_rank(rank: int) -> dict[str, int]:
    """The most numbers of a row that a step of each search sends to all ranks."""
    engine = make_engine(Case(parallel={"pipe": 2}), rank=rank)
    widest: dict[str, int] = {}
    plain = Links.from_stage
    with pytest.MonkeyPatch.context() as patch, engine.evaluating() as task:
        for name, search in SEARCHES.items():

            def noting(links: Links, tensor: Any, *, shape: Any, name: str = name, **options: Any) -> Any:
                if len(shape) == 2:
                    widest[name] = max(widest.get(name, 0), shape[1])
                return plain(links, tensor, shape=shape, **options)

            patch.setattr(Links, "from_stage", noting)
            task.decode(_sources(3), search=search)
    return widest


def test_a_search_that_reads_the_best_tokens_gets_no_others() -> None:
    for widest in run_ranks(_traffic_rank, world_size=2):
        whole = dict.fromkeys(("beam", "masked beam", "greedy", "sampling"), 64)
        assert widest == whole | {"plain beam": 2 * (3 + 1) + 1}


LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({"pipe": 2}, 2),
    ({"pipe": 2, "pipeline.schedule": "zero_bubble_v"}, 2),
    ({"pipe": 4, "pipeline.schedule": "interleaved", "pipeline.split": (1, 1, 1, 1, 1, 1, 1, 2)}, 4),
    ({"data": 2, "pipe": 2}, 4),
    ({"tensor": 2, "pipe": 2, "sequence": True}, 4),
    ({"context": 2, "pipe": 2}, 4),
]


@pytest.mark.parametrize(("parallel", "world_size"), LAYOUTS)
def test_evaluates_and_decodes_as_one_process(parallel: dict[str, Any], world_size: int) -> None:
    ((_, loss, expected),) = run_ranks(_decode_rank, world_size=1, arguments=({},))
    lengths = {len(best[0][0]) for best in expected["beam"]}
    assert len(lengths) > 2, f"the hypotheses are of too similar lengths: {lengths}"
    for data_rank, own_loss, found in run_ranks(_decode_rank, world_size=world_size, arguments=(parallel,)):
        assert own_loss == pytest.approx(loss, rel=1e-5)
        rows = slice(0, 7) if "data" not in parallel else (slice(0, 2), slice(2, 7))[data_rank]
        for name, of_search in expected.items():
            assert [[ids for ids, _ in best] for best in found[name]] == [
                [ids for ids, _ in best] for best in of_search[rows]
            ], name
