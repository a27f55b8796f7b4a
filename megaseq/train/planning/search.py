"""Tries all layouts of a model on so many devices: which fit, which are fastest, and why the others are not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from megaseq.base.errors import ParamsError
from megaseq.parallel.layout import Layout, Parallel
from megaseq.parallel.pipeline.plan import Stage, StagePlan, make_plan
from megaseq.parallel.pipeline_params import Schedule
from megaseq.parallel.refusals import broken_rules, divisors
from megaseq.train.activation_checkpointing import Mode
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.cost import StepCost, step_cost
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.memory import RankMemory
from megaseq.train.planning.subject import Subject
from megaseq.train.planning.trace import Shape

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble_v", "gpipe")
SAVES_LITTLE = 0.97
"""Selective checkpointing that keeps a larger share than this is not tried: fused attention keeps next to nothing."""


_MOST_CONTEXT = 8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A candidate with what it needs."""

    candidate: Candidate
    memory: RankMemory
    """Of the rank that needs most."""
    pipe_rank: int
    """Which that is, along the pipeline."""
    cost: StepCost


@dataclasses.dataclass
class Rejected:
    """Candidates that one reason rules out."""

    reason: str
    count: int = 0
    example: str = ""
    trains: bool = False
    """Whether such a layout would train; it is the planner that does not look at it."""


@dataclasses.dataclass
class Findings:
    """What a search has found."""

    fitting: list[Estimate] = dataclasses.field(default_factory=list)
    """Fastest first."""
    too_large: list[Estimate] = dataclasses.field(default_factory=list)
    """Smallest first."""
    rejected: dict[str, Rejected] = dataclasses.field(default_factory=dict)

    def reject(self, reason: str, *, example: str, trains: bool = False) -> None:
        """Counts a candidate that cannot be, or that is not tried though it `trains`."""
        row = self.rejected.setdefault(reason, Rejected(reason, example=example, trains=trains))
        row.count += 1


def search(subject: Subject, *, hardware: Hardware) -> Findings:
    """Returns every candidate, estimated or rejected. Params of `parallel` that the run sets are kept as they are."""
    findings = Findings()
    modes = _modes(subject)
    for parallel, layout in _layouts(subject, hardware=hardware, findings=findings):
        for candidate in _candidates(subject, parallel=parallel, layout=layout, findings=findings):
            try:
                _try(subject, candidate=candidate, hardware=hardware, modes=modes, findings=findings)
            except ParamsError:
                findings.reject("a pipe rank that would hold no parameters", example=str(layout))
    findings.fitting.sort(key=lambda estimate: (estimate.cost.total, estimate.memory.total))
    findings.too_large.sort(key=lambda estimate: estimate.memory.total)
    return findings


def _modes(subject: Subject) -> tuple[Mode, ...]:
    """Returns the checkpointing that is tried, what costs least first."""
    own = subject.params.train.activation_checkpointing
    if own.mode != "none" or own.rules:
        return (own.mode,)
    shape = Shape(1, subject.batch.source_length, subject.batch.target_length)
    kept = [
        sum(trace.kept for trace in subject.traces(tensor=1, mode=mode, shape=shape).values())
        for mode in ("none", "selective")
    ]
    return ("none", "selective", "full") if kept[1] < SAVES_LITTLE * kept[0] else ("none", "full")


def _pinned(params: Parallel.Params, path: str) -> bool:
    """Whether the run sets a param of `parallel` itself."""
    return bool(params.get(path) != Parallel.Params().get(path))


def _layouts(subject: Subject, *, hardware: Hardware, findings: Findings) -> Iterator[tuple[Parallel.Params, Layout]]:
    """Yields the sizes of all axes with every ZeRO stage and schedule."""
    own, devices = subject.params.parallel, hardware.devices
    sizes = {
        axis: [own.get(axis)] if _pinned(own, axis) else divisors(devices) for axis in ("pipe", "tensor", "context")
    }
    experts = max(subject.facts.num_experts.values(), default=1)
    sizes["expert"] = [own.expert] if _pinned(own, "expert") else divisors(experts)
    for pipe, tensor, context, expert in itertools.product(
        sizes["pipe"], sizes["tensor"], sizes["context"], sizes["expert"]
    ):
        model = pipe * tensor * context
        if devices % model or (own.data and own.data * model != devices) or (devices // model) % expert:
            continue
        layout = Layout(data=devices // model, pipe=pipe, context=context, tensor=tensor, expert=expert)
        if tensor > hardware.devices_per_machine and not _pinned(own, "tensor"):
            findings.reject(
                f"more tensor ranks than the {hardware.devices_per_machine} devices of a machine: each layer would "
                "wait for the network between machines several times; set parallel.tensor to have it tried",
                example=str(layout),
                trains=True,
            )
            continue
        if context > _MOST_CONTEXT and not _pinned(own, "context"):
            findings.reject(
                f"more than {_MOST_CONTEXT} context ranks, which rows of very many tokens alone need; set "
                "parallel.context to have them tried",
                example=str(layout),
                trains=True,
            )
            continue
        stages = [own.zero.stage] if _pinned(own, "zero.stage") else [0, 1, 2, 3]
        schedules = [own.pipeline.schedule] if pipe == 1 or _pinned(own, "pipeline.schedule") else list(SCHEDULES)
        shared = [own.sequence] if tensor == 1 or own.sequence else [False, True]
        for stage, schedule, sequence in itertools.product(stages, schedules, shared):
            if stage and layout.data * layout.context == 1:
                continue
            params = own.copy()
            params.set("zero.stage", stage, origin="the planner")
            params.set("pipeline.schedule", schedule, origin="the planner")
            for axis in ("pipe", "tensor", "context", "expert"):
                params.set(axis, layout.size(axis), origin="the planner")
            params.sequence = sequence
            yield params, layout


def _candidates(
    subject: Subject, *, parallel: Parallel.Params, layout: Layout, findings: Findings
) -> Iterator[Candidate]:
    """Yields numbers of micro-batches that deal out the rows equally and that no rule refuses."""
    rows = subject.batch.rows
    counts = _micro_batch_counts(subject, parallel=parallel, layout=layout)
    refused: list[str] = []
    uneven = f"{rows} rows that cannot be dealt out equally; with another train_input.batching.rows they can"
    for count in counts or [0]:
        params = parallel.copy()
        if layout.pipe > 1 and count:
            params.set("pipeline.micro_batches", count, origin="the planner")
        facts = dataclasses.replace(subject.facts, accumulation=max(1, count))
        broken = broken_rules(params, layout=layout, facts=facts)
        if broken:
            refused.append(f"{broken[0][0].what}: {broken[0][0].reason}")
        elif not count:
            refused.append(uneven)
        else:
            yield Candidate(parallel=params, layout=layout, micro_batches=count)
    if refused and len(refused) == len(counts or [0]):
        findings.reject(refused[0], example=str(layout), trains=refused[0] == uneven)


def _micro_batch_counts(subject: Subject, *, parallel: Parallel.Params, layout: Layout) -> list[int]:
    rows, asked = subject.batch.rows, parallel.pipeline.micro_batches
    if rows % layout.data:
        return []
    own = rows // layout.data
    if layout.pipe == 1:
        return [n for n in divisors(own) if n >= subject.facts.accumulation]
    wanted = [asked] if asked else [layout.pipe * 2**power for power in range(12)]
    return [n for n in wanted if n <= own and own % n == 0]


def _try(
    subject: Subject, *, candidate: Candidate, hardware: Hardware, modes: Sequence[Mode], findings: Findings
) -> None:
    """Estimates a candidate with as little recomputation as fits."""
    least: Estimate | None = None
    for mode in modes:
        if mode == "full" and candidate.v_shaped:
            continue
        estimate = estimate_of(subject, candidate=dataclasses.replace(candidate, checkpointing=mode), hardware=hardware)
        if estimate.memory.total <= hardware.usable_bytes:
            findings.fitting.append(estimate)
            return
        if least is None or estimate.memory.total < least.memory.total:
            least = estimate
    if least is not None:
        findings.too_large.append(least)


def stage_plan(subject: Subject, candidate: Candidate) -> StagePlan | None:
    """Returns the stages of a candidate, None without a pipeline."""
    if candidate.layout.pipe == 1:
        return None
    batch = subject.batch
    share = batch.target_length / (batch.source_length + batch.target_length)
    pipeline = candidate.parallel.pipeline
    return make_plan(subject.units, params=pipeline, ranks=candidate.layout.pipe, target_share=share)


def micro_batch_shape(subject: Subject, candidate: Candidate) -> Shape:
    """Returns the micro-batch of one rank."""
    batch, layout = subject.batch, candidate.layout
    return Shape(
        rows=max(1, batch.rows // (layout.data * candidate.micro_batches)),
        source_length=-(-batch.source_length // layout.context),
        target_length=-(-batch.target_length // layout.context),
    )


def estimate_of(subject: Subject, *, candidate: Candidate, hardware: Hardware) -> Estimate:
    """Returns memory and time of a candidate."""
    shape = micro_batch_shape(subject, candidate)
    plan = stage_plan(subject, candidate)
    memories = [rank_memory(subject, candidate=candidate, plan=plan, pipe_rank=r) for r in range(candidate.layout.pipe)]
    worst = max(range(len(memories)), key=lambda index: memories[index].total)
    state = memories
    if candidate.offloads:
        held = candidate.in_device_memory()
        state = [rank_memory(subject, candidate=held, plan=plan, pipe_rank=r) for r in range(candidate.layout.pipe)]
    heaviest = max(state, key=lambda memory: memory.parameters)
    cost = step_cost(subject, candidate=candidate, hardware=hardware, plan=plan, shape=shape, state=heaviest)
    return Estimate(candidate=candidate, memory=memories[worst], pipe_rank=worst, cost=cost)


def rank_memory(subject: Subject, *, candidate: Candidate, plan: StagePlan | None, pipe_rank: int = 0) -> RankMemory:
    """Returns the memory of a rank by its place in the pipeline."""
    shape = micro_batch_shape(subject, candidate)
    traces = subject.estimated_traces(tensor=candidate.layout.tensor, mode=candidate.checkpointing, shape=shape)
    if plan is None:
        return subject.memory.rank([subject.units], candidate=candidate, traces=traces, shape=shape)
    stages = plan.of_rank(pipe_rank)
    received, returned = [], []
    for stage in stages:
        before, after = plan.stages[max(0, stage.index - 1)], plan.stages[min(stage.index + 1, len(plan.stages) - 1)]
        received.append(_sent(before, subject=subject, candidate=candidate) if stage.index else 0)
        # A stage of the same rank hands gradients over as they are.
        returned.append(_sent(stage, subject=subject, candidate=candidate) if after.rank != pipe_rank else 0)
    return subject.memory.rank(
        [stage.units for stage in stages],
        candidate=candidate,
        traces=traces,
        shape=shape,
        pipe_rank=pipe_rank,
        received=received,
        returned=returned,
        has_loss=stages[-1].is_last,
    )


def _sent(stage: Stage, *, subject: Subject, candidate: Candidate) -> int:
    """Returns the bytes that a stage hands to the next, of a micro-batch."""
    shape = micro_batch_shape(subject, candidate)
    elements = 0
    for flow in stage.leaves:
        tokens = shape.source_length if flow.name in ("encoder", "memory") else shape.target_length
        # Tensor ranks share the residual streams alone.
        ranks = candidate.layout.tensor if candidate.sequence and flow.name in ("encoder", "decoder") else 1
        elements += shape.rows * tokens // ranks * flow.width
    return elements * subject.memory.numbers.activation
