"""Which rank gets which units of a model."""

from __future__ import annotations

from typing import Any

import pytest

from megaseq.base.errors import ParamsError
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.layers.relative import BucketedBias
from megaseq.parallel.pipeline import StagePlan, keep_tensors, make_plan
from megaseq.parallel.pipeline_params import Pipeline
from megaseq.tasks.translation import Translation
from tests.train.tiny import task_params


def _task(encoder_layers: int = 2, decoder_layers: int = 2, **changes: Any) -> Translation:
    sizes = stacks(num_layers=2, num_heads=2, hidden_dim=64, dropout=0.0, positions=SinusoidalPositions.Params())
    params = task_params(source_vocab_size=40, target_vocab_size=40, **sizes)
    params.encoder.num_layers, params.decoder.num_layers = encoder_layers, decoder_layers
    for path, value in changes.items():
        params.set(path, value, origin="the test")
    task: Translation = params.instantiate()
    return task


def _plan(task: Translation, *, ranks: int, **pipeline: Any) -> StagePlan:
    return make_plan(task.units(), params=Pipeline.Params(**pipeline), ranks=ranks)


def test_an_uneven_model_is_balanced() -> None:
    """12 encoder layers and 2 of the decoder, which cost half as much again, and the softmax, on 4 stages."""
    plan = _plan(_task(12, 2), ranks=4)
    costs = [stage.cost() for stage in plan.stages]
    assert sum(costs) / 4 > 0.8 * max(costs)
    names = [unit.name for stage in plan.stages for unit in stage.units]
    assert len(names) == 12 + 2 + 4
    # By number of layers the last stage would have had both decoder layers and two of the encoder.
    assert sum(unit.name.startswith("encoder.layers.") for unit in plan.stages[-1].units) <= 2


def test_what_travels() -> None:
    stages = _plan(_task(), ranks=4, schedule="zero_bubble_v", split=(1, 1, 1, 1, 1, 1, 1, 1)).stages
    left = [[flow.name for flow in stage.leaves] for stage in stages]
    assert left == [
        ["encoder"],
        ["encoder"],
        ["encoder"],
        ["memory"],
        ["memory", "decoder"],
        ["memory", "decoder"],
        # After the last layer nobody reads the memory.
        ["decoder"],
        ["hidden"],
    ]
    assert [stage.rank for stage in stages] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [[flow.name for flow in stage.enters] for stage in stages] == [[], *left[:-1]]


def test_ranks_of_looped_schedules() -> None:
    plan = _plan(_task(4, 4), ranks=2, schedule="interleaved", stages_per_rank=3)
    assert [stage.rank for stage in plan.stages] == [0, 1, 0, 1, 0, 1]
    assert [stage.index for stage in plan.of_rank(1)] == [1, 3, 5]


def test_tied_matrices_are_on_all_stages_that_read_them() -> None:
    task = _task()
    plan = _plan(task, ranks=4)
    holders = [rank for rank in range(4) if "source_embedding.weight" in plan.tensors_of(rank)]
    assert holders[0] == 0
    assert holders[-1] == 3
    everything = {name for name, _ in task.named_parameters()}
    assert frozenset.union(*(plan.tensors_of(rank) for rank in range(4))) == everything


def test_position_biases_that_layers_share_are_with_all_of_them() -> None:
    task = _task(4, 4, **{"encoder.position_bias": BucketedBias.Params()})
    for rank, stage in enumerate(_plan(task, ranks=4).stages):
        reads = any(unit.name.startswith("encoder.layers.") for unit in stage.units)
        assert ("encoder.position_bias.weight" in _plan(task, ranks=4).tensors_of(rank)) == reads


def test_what_is_cut_away_leaves_names_as_they_are() -> None:
    task = _task()
    before = {name: tuple(value.shape) for name, value in task.named_parameters()}
    wanted = _plan(task, ranks=2).tensors_of(1)
    assert keep_tensors(task, names=wanted) == len(wanted)
    after = {name: tuple(value.shape) for name, value in task.named_parameters()}
    assert set(after) == wanted
    assert set(task.state_dict()) == wanted
    assert all(before[name] == shape for name, shape in after.items())


@pytest.mark.parametrize(
    ("ranks", "pipeline", "message"),
    [
        (9, {}, "parallel.pipe: must make at most the 8 stages that the model has units, but is 9"),
        (5, {"schedule": "interleaved"}, "but is 5 with 2 stages a rank. Set parallel.pipe=4 at most"),
        (2, {"split": (4, 5)}, r"must be 2 positive numbers that add up to the model's 8 units, but is \(4, 5\)"),
        (2, {"split": (8, 0)}, "must be 2 positive numbers"),
        (3, {"split": (4, 4)}, "must be 3 positive numbers"),
    ],
)
def test_what_cannot_be_cut_is_refused(ranks: int, pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        _plan(_task(), ranks=ranks, **pipeline)


def test_a_rank_without_parameters_is_refused() -> None:
    task = _task(**{"encoder.final_norm": False})
    with pytest.raises(ParamsError, match=r"and pipe rank 3 has only encoder\.finish"):
        _plan(task, ranks=8, split=(1,) * 8)


def test_a_task_without_units_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"parallel.pipe: must be 1 for a task that is not made of units, but is 2"):
        make_plan((), params=Pipeline.Params(), ranks=2)


def test_lines_say_what_lies_where() -> None:
    lines = list(_plan(_task(), ranks=2).lines())
    assert lines[0].startswith("stage 0 on pipe rank 0: encoder.start to ")
    assert lines[1].startswith("stage 1 on pipe rank 1: ")
    assert " to decoder.finish, " in lines[1]
