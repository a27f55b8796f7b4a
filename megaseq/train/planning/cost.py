"""Step time of a candidate by a roofline: what is computed, read, sent and waited for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from megaseq.parallel.gradient_sums import overlapped_bucket
from megaseq.parallel.layout import AXIS_ORDER, Layout
from megaseq.parallel.pipeline.plan import StagePlan
from megaseq.parallel.spec import Unit
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.memory import RankMemory
from megaseq.train.planning.subject import Subject
from megaseq.train.planning.trace import Shape

PARTS = ("compute", "recompute", "bubble", "tensor", "context", "expert", "pipe", "data", "offload", "optimizer")
"""What a step's time is made of, in the order in which it is shown."""

ENCODER_LAUNCHES, DECODER_LAUNCHES = 45, 70
"""Operations of a layer's forward and backward pass, about."""


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A step on the rank that takes longest."""

    seconds: dict[str, float]
    """By `PARTS`; of `data` what backward passes do not hide, other exchanges as if nothing ran beside them."""
    sent: dict[str, float]
    """Bytes that this rank sends in a step, by axis."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def step_cost(
    subject: Subject,
    *,
    candidate: Candidate,
    hardware: Hardware,
    plan: StagePlan | None,
    shape: Shape,
    state: RankMemory,
) -> StepCost:
    """Estimates a step.

    Args:
        subject: model and batch.
        candidate: how it is laid out.
        hardware: on what.
        plan: stages; None without a pipeline.
        shape: of a micro-batch on one rank.
        state: weights and optimizer state of the rank that has most, as if nothing were offloaded.
    """
    ranks = range(candidate.layout.pipe)
    costs = [
        _rank_cost(subject, candidate=candidate, hardware=hardware, stages=_units(plan, rank, subject), shape=shape)
        for rank in ranks
    ]
    busiest = max(costs, key=lambda cost: cost.total)
    seconds, sent = dict(busiest.seconds), dict(busiest.sent)
    m = candidate.micro_batches
    seconds = {name: value * m for name, value in seconds.items()}
    sent = {name: value * m for name, value in sent.items()}
    bubble = candidate.bubble()
    seconds["bubble"] = sum(seconds.values()) * bubble / (1 - bubble)
    exchange = _data_exchange(subject, candidate=candidate, hardware=hardware, state=state)
    backward = 2 / 3 * seconds["compute"] + seconds["recompute"]
    seconds["data"], sent["data"] = exchange.exposed(backward, candidate=candidate), exchange.volume
    seconds |= _update(subject, candidate=candidate, hardware=hardware, state=state)
    return StepCost({part: seconds.get(part, 0.0) for part in PARTS}, sent)


def _units(plan: StagePlan | None, rank: int, subject: Subject) -> list[Sequence[Unit]]:
    return [subject.units] if plan is None else [stage.units for stage in plan.of_rank(rank)]


def _stride(layout: Layout, axis: str) -> int:
    """Returns how far apart neighbours along an axis are, in ranks."""
    inner = AXIS_ORDER[AXIS_ORDER.index(axis) + 1 :]
    return math.prod(layout.size(name) for name in inner)


def _rank_cost(
    subject: Subject, *, candidate: Candidate, hardware: Hardware, stages: list[Sequence[Unit]], shape: Shape
) -> StepCost:
    """Returns what one micro-batch costs one rank."""
    layout, size = candidate.layout, subject.memory.numbers.activation
    work = _Work(subject, shape=shape)
    operations = sum(work.operations(unit) for stage in stages for unit in stage) / layout.tensor
    layers = [unit for stage in stages for unit in stage if ".layers." in unit.name]
    weights = {name for stage in stages for unit in stage for name in unit.tensors if name in subject.weights}
    read = 3 * sum(
        subject.weights[n].local(tensor=layout.tensor, expert=layout.expert)
        * subject.memory.numbers.computed(subject.weights[n])
        for n in weights
    )
    reach = hardware.operations(subject.precision)
    slow = hardware.memory_bandwidth * 1e9
    traces = subject.estimated_traces(tensor=layout.tensor, mode="none", shape=shape)
    kept = sum(traces[unit.name].kept for stage in stages for unit in stage)
    launches = sum(DECODER_LAUNCHES if _decodes(unit) else ENCODER_LAUNCHES for unit in layers)
    compute = max(3 * operations / reach, (read + 3 * kept) / slow, launches * hardware.launch_us * 1e-6)
    again = sum(work.operations(unit) for unit in layers) / layout.tensor / reach
    if candidate.checkpointing == "selective":
        again = sum(work.attention(unit) for unit in layers) / layout.tensor / reach
    seconds = {"compute": compute, "recompute": again if candidate.checkpointing in ("full", "selective") else 0.0}
    passes = 3 if candidate.checkpointing == "full" else 2
    sent: dict[str, float] = {}
    # Keys and values go round once in the forward pass, and with their gradients in the backward pass.
    messages = 3 * (layout.context - 1) * sum(2 if _decodes(unit) else 1 for unit in layers)
    tensor = sum(work.stream(unit, size=size) * (3 if _decodes(unit) else 2) for unit in layers)
    for axis, volume, count in (
        ("tensor", passes * tensor * 2 * _share(layout.tensor), passes * 3 * len(layers)),
        ("context", 6 * (layout.context - 1) * sum(work.stream(u, size=size) for u in layers), messages),
        ("expert", 4 * _expert_volume(subject, layers=layers, work=work) * _share(layout.expert), len(layers) * 4),
        ("pipe", 2.0 * sum(work.leaves(stage[-1], size=size) for stage in stages), 2 * len(stages)),
    ):
        if axis == "expert":
            length, stride = layout.expert, _stride(layout, "data")
        else:
            length, stride = layout.size(axis), _stride(layout, axis)
        if length > 1:
            sent[axis] = volume
            seconds[axis] = _time(volume, hardware=hardware, stride=stride, size=length, count=count)
    return StepCost(seconds, sent)


class _Work:
    """Operations and activations of units, for one micro-batch."""

    def __init__(self, subject: Subject, *, shape: Shape) -> None:
        self._subject, self._shape = subject, shape

    def operations(self, unit: Unit) -> float:
        """Returns the operations of a forward pass."""
        shape = self._shape
        products = shape.source_length * unit.source_flops + shape.target_length * unit.target_flops
        return shape.rows * products + self.attention(unit)

    def attention(self, unit: Unit) -> float:
        """Returns the operations of scores and weighted sums."""
        if ".layers." not in unit.name:
            return 0.0
        batch, shape = self._subject.batch, self._shape
        pairs = shape.source_length * batch.source_length
        if _decodes(unit):
            pairs = shape.target_length * (batch.target_length + batch.source_length)
        return 4.0 * shape.rows * pairs * self._subject.attention_width

    def stream(self, unit: Unit, *, size: int) -> float:
        """Returns the bytes of a residual stream."""
        length = self._shape.target_length if _decodes(unit) else self._shape.source_length
        return float(self._shape.rows * length * unit.leaves[-1].width * size)

    def leaves(self, unit: Unit, *, size: int) -> float:
        """Returns the bytes that go to the next stage."""
        lengths = {"source": self._shape.source_length, "target": self._shape.target_length}
        return float(sum(self._shape.rows * lengths[flow.side] * flow.width * size for flow in unit.leaves))


def _decodes(unit: Unit) -> bool:
    return unit.name.startswith("decoder.")


def _expert_volume(subject: Subject, *, layers: Sequence[Unit], work: _Work) -> float:
    if not subject.facts.num_experts:
        return 0.0
    return 2 * sum(work.stream(unit, size=subject.memory.numbers.activation) for unit in layers)


def _share(size: int) -> float:
    """The share of a tensor that a rank of a ring sends to gather or to reduce it."""
    return (size - 1) / size


def _time(volume: float, *, hardware: Hardware, stride: int, size: int, count: int) -> float:
    latency = hardware.latency_us * 1e-6 * count * max(1.0, math.log2(size))
    return volume / hardware.speed(stride=stride, size=size) + latency


def _expert_part(subject: Subject, *, layout: Layout) -> float:
    """Returns what part of a rank's weights is of experts that ranks along `expert` share: fewer hold the same."""
    if layout.expert == 1:
        return 0.0
    total = of_experts = 0
    for weight in subject.weights.values():
        size = weight.local(tensor=layout.tensor, expert=layout.expert)
        total += size
        of_experts += size if "expert" in weight.axes else 0
    return of_experts / total


@dataclasses.dataclass(frozen=True)
class _DataExchange:
    """Sums of gradients and gathered weights over data and context ranks, in a step."""

    volume: float = 0.0
    """Bytes that a rank sends."""
    sums: float = 0.0
    """Seconds of the sums of gradients."""
    weights: float = 0.0
    """Seconds in which weights are gathered."""
    buckets: int = 1
    """In which gradients are summed."""

    def exposed(self, backward: float, *, candidate: Candidate) -> float:
        """Returns the seconds that `backward`, the seconds of a step's backward passes, does not hide."""
        if not candidate.overlaps:
            return self.sums + self.weights
        # Stage 0 sums beside the last micro-batch alone; the last bucket has nothing beside it.
        beside = backward / (candidate.micro_batches if candidate.parallel.zero.stage == 0 else 1)
        return self.sums - min(self.sums * (1 - 1 / self.buckets), beside) + self.weights


def _data_exchange(subject: Subject, *, candidate: Candidate, hardware: Hardware, state: RankMemory) -> _DataExchange:
    layout, zero = candidate.layout, candidate.parallel.zero
    copies = layout.data * layout.context
    if copies == 1:
        return _DataExchange()
    experts = _expert_part(subject, layout=layout)
    # Stage 3 has a share of each: a larger one of experts.
    whole = state.parameters * (copies / (1 + experts * (layout.expert - 1)) if zero.stage == 3 else 1)
    gradients = whole * (2 if subject.precision == "bf16" and not zero.stage else 1)
    elements = int(whole) // subject.memory.numbers.activation
    bucket = zero.bucket_elements
    if candidate.overlaps and not zero.stage:
        bucket = overlapped_bucket(elements, bucket_elements=bucket)
    buckets = max(1, math.ceil(elements / bucket))
    # From stage 2 on, each micro-batch's gradients are reduced by themselves.
    times = candidate.micro_batches if zero.stage >= 2 else 1
    share = (1 - experts) * _share(copies) + experts * _share(copies // layout.expert)
    reduced = gradients * (2 if not zero.stage else times) * share
    # In stage 3 weights are gathered for each forward and backward pass.
    gathered = {0: 0, 1: whole, 2: whole, 3: 2 * whole * candidate.micro_batches}[zero.stage] * share
    stride = _stride(layout, "context") if layout.context > 1 else _stride(layout, "data")
    seconds = [
        _time(volume, hardware=hardware, stride=stride, size=copies, count=count) if volume else 0.0
        for volume, count in ((reduced, buckets * times), (gathered, buckets * times))
    ]
    return _DataExchange(volume=reduced + gathered, sums=seconds[0], weights=seconds[1], buckets=buckets)


def _update(subject: Subject, *, candidate: Candidate, hardware: Hardware, state: RankMemory) -> dict[str, float]:
    """Returns the seconds of the optimizer and of what travels between device and host: one waits for the other."""
    layout, zero, size = candidate.layout, candidate.parallel.zero, subject.memory.numbers.activation
    copies = layout.data * layout.context
    # Bytes of what the module computes with, of this rank's share.
    share = state.parameters / (1 if zero.stage == 3 else copies)
    link, disk = hardware.host_link_bandwidth * 1e9, hardware.disk_bandwidth * 1e9
    # Weights, gradients and state are read, weights and state written.
    optimizer = 2 * (state.parameters + state.optimizer + state.gradients) / (hardware.memory_bandwidth * 1e9)
    offload = 0.0
    if zero.offload_optimizer != "none":
        gradients = share / size * 4
        optimizer = 2 * (state.optimizer + gradients) / (hardware.host_memory_bandwidth * 1e9)
        if zero.offload_optimizer == "nvme":
            optimizer = max(optimizer, 2 * state.optimizer / disk)
        offload += (gradients + share) / link
    if zero.offload_parameters != "none":
        # Read for the forward and for the backward pass of each micro-batch.
        speed = link if zero.offload_parameters == "cpu" else min(link, disk)
        offload += 2 * candidate.micro_batches * share / speed
    return {"optimizer": optimizer, "offload": offload}
