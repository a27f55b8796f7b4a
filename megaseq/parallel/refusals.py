"""Layouts that do not work: one table of rows, checked when a run starts, by the planner, and against the docs.

A row is a rule between params of `parallel`, the sizes of the mesh and facts of the model. To refuse something, write a
generator that yields a `Broken` for each value that breaks the rule, and add a `Refusal` with it to `REFUSALS`; the
table of docs/parallelism.md shows every row, and a test compares the two.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from megaseq.base.errors import AsText, ParamsError, must
from megaseq.parallel.layout import Layout, Parallel
from megaseq.parallel.pipeline_params import Schedule, stages_per_rank
from megaseq.parallel.sharding import merged_rules

_AXES = ("pipe", "context", "tensor", "expert")
"""Params that change how many processes a run starts itself where `data` is open."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What of a model, its batches and its learner decides whether a layout works; plain numbers.

    Counts are by path, such as `task.encoder.layer.self_attention`; what is unknown is absent or 0 and refuses
    nothing.
    """

    num_heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Query heads of each attention."""
    num_key_value_heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Key and value heads of each attention."""
    num_experts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Experts of each mixture-of-experts layer."""
    hidden_dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Hidden units of each feed-forward block."""
    limited_experts: frozenset[str] = frozenset()
    """Mixture-of-experts layers whose experts take a share of a row's tokens at most."""
    vocab_size: int = 0
    """Tokens of the smaller vocabulary; 0: it comes from the data."""
    num_units: int = 0
    """Pieces that a pipeline may be cut between: embeddings, layers, loss."""
    rows: int = 0
    """Rows of a global batch; 0: it varies."""
    source_length: int = 0
    """Tokens of a source row; 0: it varies."""
    target_length: int = 0
    """Tokens of a target row; 0: it varies."""
    accumulation: int = 1
    """Micro-batches of a step."""
    checkpointing: frozenset[str] = frozenset()
    """Modes of activation checkpointing of the layers."""
    compiled: bool = False
    """Whether layers are compiled."""
    precision: str = "fp32"
    """fp32, bf16 or bf16_autocast."""
    optimizer: str = ""
    """Class name of the optimizer."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a rule looks at."""

    params: Parallel.Params
    layout: Layout
    facts: ModelFacts

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of one rank."""
        return stages_per_rank(self.params.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step through the pipeline."""
        return self.params.pipeline.micro_batches or max(self.facts.accumulation, self.layout.pipe)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A value that breaks a rule; the parts of the sentence `<path>: must <rule>, but is <value>.`"""

    path: str
    rule: str
    value: object


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One row of the table."""

    what: str
    """The combination, as docs show it."""
    reason: str
    """Why it does not work, as docs show it and the error says it."""
    find: Callable[[Case], Iterator[Broken]]
    """Yields what breaks the rule."""


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _heads(case: Case) -> Iterator[Broken]:
    for path, heads in case.facts.num_heads.items():
        if heads % case.layout.tensor and merged_rules(case.params.rules).get("heads") == "tensor":
            yield Broken("parallel.tensor", f"be one of {divisors(heads)} for {path}", case.layout.tensor)


def _key_heads(case: Case) -> Iterator[Broken]:
    tensor = case.layout.tensor
    for path, heads in case.facts.num_key_value_heads.items():
        if heads % tensor and tensor % heads:
            yield Broken("parallel.tensor", f"divide or be a multiple of the {heads} key heads of {path}", tensor)


def _ulysses(case: Case) -> Iterator[Broken]:
    context, tensor = case.layout.context, case.layout.tensor
    if context == 1 or case.params.context_method != "ulysses":
        return
    for path, heads in case.facts.num_heads.items():
        keys = case.facts.num_key_value_heads.get(path, heads)
        if heads % (context * tensor) or keys % (context * tensor):
            rule = f"have a product with tensor ({tensor}) that divides the heads and key heads of {path}"
            yield Broken("parallel.context", rule, AsText(f"{context} for {heads} and {keys} heads"))


def _zero3_pipe(case: Case) -> Iterator[Broken]:
    if case.layout.pipe > 1 and case.params.zero.stage == 3:
        yield Broken("parallel.zero.stage", "be below 3 where parallel.pipe is above 1", 3)


def _zero2_stages(case: Case) -> Iterator[Broken]:
    if case.layout.pipe > 1 and case.params.zero.stage == 2 and case.stages_per_rank > 1:
        rule = f"be below 2 with the {case.stages_per_rank} stages a rank of schedule {case.params.pipeline.schedule}"
        yield Broken("parallel.zero.stage", rule, 2)


def _zero1_overlap(case: Case) -> Iterator[Broken]:
    if case.params.zero.stage == 1 and case.params.zero.overlap:
        yield Broken("parallel.zero.overlap", "be false with ZeRO stage 1", True)


def _too_many_stages(case: Case) -> Iterator[Broken]:
    stages = case.layout.pipe * case.stages_per_rank
    if case.layout.pipe > 1 and case.facts.num_units and stages > case.facts.num_units:
        rule = f"make at most the {case.facts.num_units} stages that the model's units give"
        yield Broken("parallel.pipe", rule, AsText(f"{case.layout.pipe} with {case.stages_per_rank} stages a rank"))


def _split(case: Case) -> Iterator[Broken]:
    split, stages = case.params.pipeline.split, case.layout.pipe * case.stages_per_rank
    if case.layout.pipe == 1 or not split:
        return
    if len(split) != stages or min(split) < 1 or (case.facts.num_units and sum(split) != case.facts.num_units):
        units = case.facts.num_units or "the model's"
        yield Broken("parallel.pipeline.split", f"give each of {stages} stages some of {units} units, none over", split)


def _stages_of_schedule(case: Case) -> Iterator[Broken]:
    schedule, stages = case.params.pipeline.schedule, case.stages_per_rank
    wanted = {"gpipe": (1, 1), "1f1b": (1, 1), "zero_bubble_v": (2, 2), "interleaved": (2, 1 << 30)}[schedule]
    if case.layout.pipe > 1 and not wanted[0] <= stages <= wanted[1]:
        rule = f"be {'at least 2' if wanted[1] > 2 else wanted[0]} with schedule {schedule}"
        yield Broken("parallel.pipeline.stages_per_rank", rule, stages)


def _few_micro_batches(case: Case) -> Iterator[Broken]:
    pipe, schedule = case.layout.pipe, case.params.pipeline.schedule
    if pipe == 1:
        return
    path = "parallel.pipeline.micro_batches" if case.params.pipeline.micro_batches else "train.accumulation"
    if schedule == "interleaved" and case.micro_batches % pipe:
        yield Broken(path, f"be a multiple of parallel.pipe ({pipe}) with schedule interleaved", case.micro_batches)
    elif schedule != "gpipe" and case.micro_batches < pipe:
        yield Broken(path, f"be at least parallel.pipe ({pipe}) with schedule {schedule}", case.micro_batches)


def _few_rows(case: Case) -> Iterator[Broken]:
    parts = case.layout.data * (case.micro_batches if case.layout.pipe > 1 else 1)
    if case.facts.rows and case.facts.rows < parts:
        rule = "have a row for each data rank and micro-batch of the pipeline"
        yield Broken("train_input", rule, AsText(f"of {case.facts.rows} rows for {parts}"))


def _compiled_zero_bubble(case: Case) -> Iterator[Broken]:
    if case.layout.pipe > 1 and case.facts.compiled and case.params.pipeline.schedule == "zero_bubble_v":
        rule = "be another than zero_bubble_v with train.compile"
        yield Broken("parallel.pipeline.schedule", rule, case.params.pipeline.schedule)


def _no_experts(case: Case) -> Iterator[Broken]:
    if case.layout.expert > 1 and not case.facts.num_experts:
        yield Broken("parallel.expert", "be 1 for a model without mixture-of-experts layers", case.layout.expert)
    for path, experts in case.facts.num_experts.items():
        if experts % case.layout.expert:
            yield Broken("parallel.expert", f"be one of {divisors(experts)} for {path}", case.layout.expert)


def _experts_context(case: Case) -> Iterator[Broken]:
    for path in sorted(case.facts.limited_experts):
        if case.layout.context > 1:
            rule = f"be 1 where the experts of {path} have a capacity"
            yield Broken("parallel.context", rule, case.layout.context)


def _hidden(case: Case) -> Iterator[Broken]:
    tensor = case.layout.tensor
    for path, units in case.facts.hidden_dims.items():
        if units % tensor and merged_rules(case.params.rules).get("hidden") == "tensor":
            near = [n for n in divisors(units) if n <= 4 * tensor]
            yield Broken("parallel.tensor", f"be one of {near} for {path}", tensor)


def _vocabulary(case: Case) -> Iterator[Broken]:
    if 0 < case.facts.vocab_size < case.layout.tensor:
        yield Broken("parallel.tensor", f"be at most the {case.facts.vocab_size} tokens", case.layout.tensor)


def _sequence_rules(case: Case) -> Iterator[Broken]:
    rules = merged_rules(case.params.rules)
    if case.params.sequence and not rules.get("heads") == rules.get("hidden") == "tensor":
        yield Broken("parallel.sequence", "be false where rules keep heads or hidden units whole", True)


def _full_zero_bubble(case: Case) -> Iterator[Broken]:
    schedule = case.params.pipeline.schedule
    if case.layout.pipe > 1 and schedule == "zero_bubble_v" and "full" in case.facts.checkpointing:
        rule = "not be zero_bubble_v with train.activation_checkpointing.mode=full"
        yield Broken("parallel.pipeline.schedule", rule, schedule)


def _adafactor(case: Case) -> Iterator[Broken]:
    if case.facts.optimizer != "Adafactor":
        return
    if case.params.zero.stage:
        yield Broken("parallel.zero.stage", "be 0 with Adafactor", case.params.zero.stage)
    for axis in ("tensor", "expert"):
        if case.layout.size(axis) > 1:
            yield Broken(f"parallel.{axis}", "be 1 with Adafactor", case.layout.size(axis))


REFUSALS: list[Refusal] = [
    Refusal("heads that `tensor` does not divide", "a head is computed by one rank", _heads),
    Refusal(
        "key heads that neither divide `tensor` nor are divided by it",
        "a rank holds whole key heads, or one that it shares with others",
        _key_heads,
    ),
    Refusal(
        "`context_method=ulysses` with heads that `context` x `tensor` does not divide",
        "Ulysses deals whole heads out to the context ranks; ring needs none",
        _ulysses,
    ),
    Refusal(
        "ZeRO 3 with `pipe`",
        "DeepSpeed's stage 3 gathers parameters in an order that all ranks of the run must share",
        _zero3_pipe,
    ),
    Refusal(
        "ZeRO 2 with several stages a rank",
        "DeepSpeed's stage 2 reduces a gradient when it is first complete, before the backward of other stages",
        _zero2_stages,
    ),
    Refusal(
        "ZeRO 1 with `zero.overlap`",
        "stage 1 reduces gradients when all micro-batches are done; stage 2 can overlap",
        _zero1_overlap,
    ),
    Refusal("more stages than units", "a stage without a layer has nothing to do", _too_many_stages),
    Refusal("a `pipeline.split` that does not add up", "every unit belongs to exactly one stage", _split),
    Refusal(
        "`pipeline.stages_per_rank` that the schedule cannot have",
        "gpipe and 1f1b have one stage a rank, zero_bubble_v two, interleaved two or more",
        _stages_of_schedule,
    ),
    Refusal(
        "too few micro-batches for the schedule",
        "every rank must be at work before the first micro-batch comes back",
        _few_micro_batches,
    ),
    Refusal(
        "`pipeline.schedule=zero_bubble_v` with `train.compile`",
        "its backward pass comes in two halves, and that of a compiled layer is one piece",
        _compiled_zero_bubble,
    ),
    Refusal("fewer rows than data ranks", "a rank without a row has nothing to do", _few_rows),
    Refusal("`expert` that does not divide the experts", "a rank holds whole experts, equally many", _no_experts),
    Refusal(
        "`context` with experts of a capacity",
        "the capacity is a share of a row's tokens, of which a rank has a part",
        _experts_context,
    ),
    Refusal("hidden units that `tensor` does not divide", "ranks compute equally many", _hidden),
    Refusal("fewer tokens of the vocabulary than `tensor`", "a rank without tokens has no softmax", _vocabulary),
    Refusal(
        "`sequence` with rules that keep heads or hidden units whole",
        "tokens are gathered and dealt out where a divided product begins and ends",
        _sequence_rules,
    ),
    Refusal(
        "`pipeline.schedule=zero_bubble_v` with layers that are computed again in full",
        "its backward pass comes in two halves, and what a layer computes again is gone after the first",
        _full_zero_bubble,
    ),
    Refusal(
        "Adafactor with ZeRO, `tensor` or `expert`",
        "its factored moments are means over whole rows and columns; use AdamW, or data and pipe alone",
        _adafactor,
    ),
]
"""All rows, in the order in which they are checked."""


def broken_rules(params: Parallel.Params, *, layout: Layout, facts: ModelFacts) -> list[tuple[Refusal, Broken]]:
    """Returns the rows that refuse a layout, each with the first value that breaks it; empty: it works."""
    case = Case(params=params, layout=layout, facts=facts)
    found = ((refusal, next(refusal.find(case), None)) for refusal in REFUSALS)
    return [(refusal, broken) for refusal, broken in found if broken is not None]


def check_layout(params: Parallel.Params, *, layout: Layout, facts: ModelFacts, launched: bool = True) -> None:
    """Refuses a layout that does not work, with the reason and the nearest layout that works.

    Args:
        params: of the run.
        layout: what `resolve_layout` made of them and of the number of processes.
        facts: of the model.
        launched: whether the number of processes is given; else it follows from the params.

    Raises:
        ParamsError: one line for each row of the table that refuses the layout; the last ends with what would work.
    """
    found = broken_rules(params, layout=layout, facts=facts)
    if not found:
        return
    nearest = nearest_layout(params, layout=layout, facts=facts, launched=launched)
    remedy = f"The nearest that works is {nearest}" if nearest else "No layout of as many processes works"
    lines = [
        str(must(broken.path, broken.rule, broken.value, f"{refusal.reason[0].upper()}{refusal.reason[1:]}"))
        for refusal, broken in found
    ]
    raise ParamsError("\n".join([*lines[:-1], f"{lines[-1]} {remedy}."]))


def nearest_layout(params: Parallel.Params, *, layout: Layout, facts: ModelFacts, launched: bool = True) -> str:
    """Returns, as `path=value path=value`, the fewest changes that make a layout of as many processes work.

    Empty: none of those tried works. Tried are other sizes of one or two axes, lower ZeRO stages, other schedules and
    what else the rows speak of.

    Args:
        params: of the run.
        layout: of the run.
        facts: of the model.
        launched: whether there are as many processes with any params; else `data` is named where the axes change.
    """
    best: tuple[float, str] | None = None
    for changes in _changes(params, layout=layout):
        changed = params.copy()
        for path, value in changes.items():
            changed.set(path, value, origin="the nearest layout")
        other = _resized(changed, world_size=layout.world_size)
        cost = _distance(changes, layout=layout)
        if other is None or (best and best[0] <= cost) or changed.check():
            continue
        if not broken_rules(changed, layout=other, facts=facts):
            named = dict(changes)
            if not (launched or params.processes) and not named.keys().isdisjoint(_AXES):
                named["data"] = other.data
            best = (cost, " ".join(f"parallel.{path}={_shown(value)}" for path, value in named.items()))
    return best[1] if best else ""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resized(params: Parallel.Params, *, world_size: int) -> Layout | None:
    model = params.pipe * params.context * params.tensor
    data = world_size // model
    if world_size % model or data < 1 or data % params.expert:
        return None
    return Layout(data=data, pipe=params.pipe, context=params.context, tensor=params.tensor, expert=params.expert)


def _changes(params: Parallel.Params, *, layout: Layout) -> Iterator[dict[str, object]]:
    """Yields sets of changes, none of which touches what the run's other params mean."""
    sizes = divisors(layout.world_size)
    axes: list[dict[str, object]] = [{}]
    for axis in _AXES:
        axes += [{axis: size} for size in sizes if size != getattr(params, axis)]
    for one, other in itertools.permutations(("pipe", "context", "tensor"), 2):
        if layout.size(one) > 1:
            axes += [{one: 1, other: size} for size in sizes if size not in (1, getattr(params, other))]
    schedules: tuple[Schedule, ...] = ("1f1b", "gpipe")
    others: list[dict[str, object]] = [{}]
    others += [{"zero.stage": stage} for stage in range(params.zero.stage)]
    others += [{"pipeline.schedule": name, "pipeline.stages_per_rank": 0} for name in schedules]
    others += [{"pipeline.stages_per_rank": 0}, {"pipeline.split": ()}, {"zero.overlap": False}]
    others += [{"pipeline.split": (), "pipeline.stages_per_rank": 0}]
    others += [{"pipeline.micro_batches": layout.pipe * factor} for factor in (1, 2)]
    others += [{"context_method": "ring"}, {"sequence": False}, {"zero.offload_optimizer": "cpu"}]
    for axis_change, other_change in itertools.product(axes, others):
        merged: dict[str, object] = {**axis_change, **other_change}
        merged = {path: value for path, value in merged.items() if params.get(path) != value}
        if params.data and set(merged) & {"pipe", "context", "tensor"}:
            merged["data"] = 0
        if merged.get("tensor") == 1 and params.sequence:
            merged["sequence"] = False
        if merged.get("zero.stage") == 0 and params.zero.offload_optimizer != "none":
            merged["zero.offload_optimizer"] = "none"
        if "zero.stage" in merged and params.zero.offload_parameters != "none":
            merged["zero.offload_parameters"] = "none"
        if merged:
            yield merged


def _distance(changes: Mapping[str, object], *, layout: Layout) -> float:
    """How much a person would have to give up: the number of params, then how far the axes move."""
    moved = 0.0
    for axis in _AXES:
        size = changes.get(axis)
        if isinstance(size, int):
            here = layout.size(axis)
            # Slightly in favour of the smaller one, which asks less of the machines' network.
            moved += max(size / here, here / size) + (0.01 if size > here else 0.0)
    stage = changes.get("zero.stage")
    lowered = (4 - stage) * 0.01 if isinstance(stage, int) else 0.0
    return len([path for path in changes if path != "data"]) + moved * 0.05 + lowered
