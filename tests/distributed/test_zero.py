"""ZeRO stages beside plain parity: what is skipped, averaged, frozen, evaluated, saved and refused."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.base.errors import ParamsError
from megaseq.checkpoint.piece import Piece
from megaseq.learner import Adafactor, MovingAverage, ParameterRule
from megaseq.train.engine import Engine
from megaseq.train.updaters import zero
from megaseq.train.updaters.deepspeed_package import load_deepspeed

from .harness import run_ranks
from .launching import losses, run_megaseq
from .launching import train as train_arguments
from .parity import Case, local_rows, make_engine, packed_batch
from .test_parity import EXPERTS

AVERAGE = {"ema": MovingAverage.Params(decay=0.9)}


def train(engine: Engine, *, first: int, stop: int) -> list[float]:
    """Losses of steps `first` to `stop`."""
    means = []
    for step in range(first, stop):
        result = engine.train_step(local_rows(packed_batch(step), mesh=engine.mesh), step=step)
        means.append(result.loss_sum / result.weight)
    return means


def whole(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """All logical tensors, put together of what all ranks hold."""
    own = [(piece.name, piece.global_shape, piece.start, piece.tensor.clone()) for piece in pieces]
    gathered: list[Any] = [own]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, start, tensor in (piece for held in gathered for piece in held):
        target = tensors.setdefault(name, torch.full(shape, math.nan))
        target[tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))] = tensor
    return tensors


def fill(pieces: list[Piece], tensors: dict[str, torch.Tensor]) -> None:
    """Writes whole tensors into what this rank holds of them."""
    assert {piece.name for piece in pieces} <= tensors.keys()
    for piece in pieces:
        place = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
        piece.tensor.copy_(tensors[piece.name][place])


def evaluated(engine: Engine, *, averaged: bool = True) -> float:
    """The loss of a batch that was not trained on, which all ranks have whole."""
    with engine.evaluating(averaged=averaged) as task:
        output = task.compute_loss(packed_batch(500))
    return float(output.loss_sum / output.weight)


def _one_rank_is_poisoned(rank: int, stage: int, precision: str, expert: int) -> None:
    parallel = {"data": 2, "expert": expert, "zero.stage": stage, "zero.persistence_elements": 0}
    task = EXPERTS if expert > 1 else {}
    engine = make_engine(Case(parallel=parallel, learner=AVERAGE, precision=precision, task=task), rank=rank)
    train(engine, first=0, stop=2)
    before, used = whole(engine.pieces()), evaluated(engine, averaged=False)
    batch = local_rows(packed_batch(2), mesh=engine.mesh).deep_copy()
    if rank == 1:
        batch.target.weights = batch.target.weights.clone()
        batch.target.weights[-1, 0] = math.nan
    assert engine.train_step(batch, step=2).skipped == "non-finite"
    after = whole(engine.pieces())
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert evaluated(engine, averaged=False) == used
    assert engine.learner.optimizer.num_updates == 2 and engine.learner.num_skipped == 1
    assert all(math.isfinite(loss) for loss in train(engine, first=3, stop=5))
    assert not torch.equal(
        whole(engine.pieces())["task.source_embedding.weight"], before["task.source_embedding.weight"]
    )


@pytest.mark.parametrize(
    ("stage", "precision", "expert"),
    [(0, "fp32", 1), (1, "bf16", 1), (2, "fp32", 1), (3, "fp32", 1), (3, "bf16", 1), (1, "fp32", 2), (3, "fp32", 2)],
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    stage: int, precision: str, expert: int
) -> None:
    run_ranks(_one_rank_is_poisoned, world_size=2, arguments=(stage, precision, expert))


DISK = {"zero.offload_optimizer": "nvme", "zero.nvme_path": tempfile.gettempdir()}


def _evaluate_rank(rank: int, parallel: dict[str, Any]) -> list[float]:
    # So little that shares on a disk are updated in many parts, which begin and end in the middle of parameters.
    zero.STREAMED_ELEMENTS = 1000
    engine = make_engine(Case(parallel=parallel, learner=AVERAGE), rank=rank)
    train(engine, first=0, stop=3)
    figures = [evaluated(engine), evaluated(engine, averaged=False)]
    train(engine, first=3, stop=5)
    return [*figures, evaluated(engine)]


@pytest.mark.parametrize(("stage", "disk"), [(1, {}), (3, {}), (2, DISK), (3, DISK)])
def test_evaluation_has_the_averages_and_training_goes_on_without(stage: int, disk: dict[str, str]) -> None:
    expected = run_ranks(_evaluate_rank, world_size=1, arguments=({},))[0]
    assert expected[0] != expected[1]
    parallel = {"data": 2, "zero.stage": stage, "zero.persistence_elements": 0, **disk}
    for figures in run_ranks(_evaluate_rank, world_size=2, arguments=(parallel,)):
        assert figures == pytest.approx(expected, rel=1e-5)


def _unequal_rank(rank: int) -> list[float]:
    engine = make_engine(Case(parallel={"data": 2, "zero.stage": 3, "zero.persistence_elements": 0}), rank=rank)
    train(engine, first=0, stop=2)
    with engine.evaluating() as task:
        # As when sentences of one rank end earlier than those of the other.
        for step in range(1 + 4 * rank):
            task.compute_loss(packed_batch(step))
    return train(engine, first=2, stop=4)


def test_ranks_may_do_unequal_work_while_they_evaluate() -> None:
    first, second = run_ranks(_unequal_rank, world_size=2, timeout_seconds=90)
    assert first == second


def _change_rank(rank: int, stages: tuple[int, ...], offload: str) -> list[float]:
    zero.STREAMED_ELEMENTS = 1000
    figures: list[float] = []
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    for turn, stage in enumerate(stages):
        parallel = {"data": 2, "zero.stage": stage, "zero.persistence_elements": 0}
        if stage:
            parallel |= {"zero.offload_optimizer": offload, "zero.nvme_path": tempfile.gettempdir()}
        engine = make_engine(Case(parallel=parallel, learner=AVERAGE), rank=rank)
        if turn:
            fill(engine.pieces(), tensors)
            engine.loaded(learner_state=state)
        figures += train(engine, first=2 * turn, stop=2 * turn + 2)
        tensors, state = whole(engine.pieces()), engine.learner.state()
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "offload"), [((1, 3, 0, 2, 1), "none"), ((3, 2, 3), "cpu"), ((0, 3, 3), "none"), ((1, 2, 0, 3), "nvme")]
)
def test_a_run_goes_on_with_another_stage(stages: tuple[int, ...], offload: str) -> None:
    expected = run_ranks(_change_rank, world_size=2, arguments=((0,) * len(stages), "none"))[0]
    got = run_ranks(_change_rank, world_size=2, arguments=(stages, offload), timeout_seconds=300)[0]
    assert got == pytest.approx(expected, rel=1e-5)


def _resident(*, peak: bool) -> int:
    """Bytes of this process that are in memory, files that are mapped among them; or the most since the last reset."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _resident_rank(rank: int, offload: str) -> tuple[int, int, int]:
    zero.STREAMED_ELEMENTS = 1 << 18
    parallel = {"zero.stage": 1, "zero.bucket_elements": 1 << 16, **DISK, "zero.offload_optimizer": offload}
    sizes = {"source_vocab_size": 30_000, "target_vocab_size": 30_000, "model_dim": 512}
    engine = make_engine(Case(parallel=parallel, learner=AVERAGE, task=sizes), rank=rank)
    train(engine, first=0, stop=1)
    # What has been used at most is counted anew.
    Path("/proc/self/clear_refs").write_text("5")
    train(engine, first=1, stop=2)
    return engine.num_parameters, _resident(peak=True), _resident(peak=False)


def test_what_lies_on_a_disk_is_not_in_memory() -> None:
    ((count, peak, after),) = run_ranks(_resident_rank, world_size=1, arguments=("nvme",))
    ((_, peak_in_memory, after_in_memory),) = run_ranks(_resident_rank, world_size=1, arguments=("cpu",))
    # Two moments and the average; masters pass through while they are copied.
    assert peak_in_memory - peak > 0.8 * count * 3 * 4
    assert after_in_memory - after > 0.9 * count * 4 * 4


def _held_rank(rank: int, stage: int) -> list[tuple[str, int, int]]:
    """(name, elements here, elements of all) of the pieces of the first moment."""
    engine = make_engine(Case(parallel={"data": 4, "expert": 2, "zero.stage": stage}, task=EXPERTS), rank=rank)
    pieces = [piece for piece in engine.pieces() if piece.name.startswith("learner.first_moment.")]
    return [(piece.name, piece.tensor.numel(), math.prod(piece.global_shape)) for piece in pieces]


@pytest.mark.parametrize("stage", [1, 3])
def test_every_element_of_experts_and_others_is_in_one_share(stage: int) -> None:
    held: dict[str, int] = {}
    whole: dict[str, int] = {}
    pieces = itertools.chain.from_iterable(run_ranks(_held_rank, world_size=4, arguments=(stage,)))
    for name, count, total in pieces:
        held[name] = held.get(name, 0) + count
        whole[name] = total
    assert held == whole and any(".ffn.router." in name for name in held)


def _frozen_rank(rank: int, parallel: dict[str, Any], precision: str, task: dict[str, Any]) -> list[float]:
    pattern = r"encoder\.layers\.1\." if task else r"encoder\.layers\.0\."
    learner = {
        "freeze_patterns": (pattern,),
        "rules": (ParameterRule.Params(pattern=r"norm", learning_rate_scale=0.5),),
    }
    engine = make_engine(Case(parallel=parallel, learner=learner, precision=precision, task=task), rank=rank)
    before = whole(engine.pieces())
    means = train(engine, first=0, stop=4)
    after = whole(engine.pieces())
    frozen = [name for name in before if re.search(pattern, name)]
    assert frozen and all(name.startswith("task.") for name in frozen)
    for name in frozen:
        assert after[name].dtype is torch.float32 and torch.equal(after[name], before[name]), name
    fill(engine.pieces(), after)
    engine.updater.publish()
    return [*means, *train(engine, first=4, stop=6)]


@pytest.mark.parametrize(
    ("stage", "precision", "expert"),
    [(1, "fp32", 1), (3, "fp32", 1), (2, "bf16", 1), (3, "bf16", 1), (1, "fp32", 2), (3, "fp32", 2)],
)
def test_frozen_parameters_stay_and_are_saved(stage: int, precision: str, expert: int) -> None:
    task = EXPERTS if expert > 1 else {}
    expected = run_ranks(_frozen_rank, world_size=1, arguments=({}, precision, task))[0]
    parallel = {"data": 2, "expert": expert, "zero.stage": stage, "zero.persistence_elements": 0}
    got = run_ranks(_frozen_rank, world_size=2, arguments=(parallel, precision, task))[0]
    assert got == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(
    ("parallel", "learner", "line"),
    [
        ({"zero.stage": 1}, {"optimizer": Adafactor.Params()}, "learner.optimizer: must work on runs of elements"),
        ({"zero.stage": 1, "zero.overlap": True}, {}, "parallel.zero.overlap: must be false with ZeRO stage 1"),
        (
            {"zero.stage": 3, "zero.offload_parameters": "nvme", "zero.nvme_path": "/tmp"},
            {},
            r"^parallel.zero.offload_parameters: must be none or cpu where DeepSpeed's operator async_io cannot be "
            r"loaded, but is 'nvme'\. Install libaio-dev, or set it to cpu\.$",
        ),
        (
            {"zero.stage": 1, "zero.offload_optimizer": "nvme", "zero.nvme_path": "/nowhere"},
            {},
            r"^parallel.zero.nvme_path: must be a directory .* but is /nowhere \(No such file or directory\)",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(
    parallel: dict[str, Any], learner: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(load_deepspeed(torch.device("cpu")).ops.__compatible_ops__, "async_io", False)
    with pytest.raises(ParamsError, match=line):
        make_engine(Case(parallel=parallel, learner=learner), rank=0)


STAGE3 = ("parallel.data=2", "parallel.zero.stage=3", "parallel.zero.persistence_elements=0")
IN_STAGES = (
    *(f"task.{stack}.layer.ffn.cls=megaseq.layers.moe.MixtureOfExperts" for stack in ("encoder", "decoder")),
    *(f"task.{stack}.layer.ffn.num_experts=4" for stack in ("encoder", "decoder")),
    *("parallel.data=2", "parallel.expert=2", "parallel.pipe=2", "parallel.zero.stage=1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [STAGE3, IN_STAGES], ids=["stage3", "experts-in-stages"])
@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_a_run_evaluates_decodes_saves_and_goes_on(tmp_path: Path, layout: tuple[str, ...], offload: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    log = tmp_path / "log"
    overrides = (
        *layout,
        f"parallel.zero.offload_optimizer={offload}",
        f"parallel.zero.nvme_path={disk}",
        "learner.ema.cls=megaseq.learner.ema.MovingAverage",
        "train.eval_interval_steps=3",
        "train.decode_interval_steps=3",
        "checkpoint.interval_steps=3",
    )
    texts = []
    for max_steps in (3, 6):
        arguments = train_arguments(
            tmp_path / "run", cache=tmp_path / "cache", overrides=(*overrides, f"train.max_steps={max_steps}")
        )
        code, text = run_megaseq([*arguments, "--allow-changed-params"], log=log)
        assert code == 0, text
        texts.append(text)
        assert not list(disk.iterdir())
    assert "goes on from step 3" in texts[1]
    for text in texts:
        assert "eval/held_out" in text and "decode/held_out" in text
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
