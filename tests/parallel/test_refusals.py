"""Every row of the table refuses what it says, and names a layout that works."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megaseq.base.errors import ParamsError
from megaseq.parallel.layout import Layout, Parallel, resolve_layout
from megaseq.parallel.refusals import REFUSALS, ModelFacts, broken_rules, check_layout, nearest_layout
from megaseq.parallel.spawn import num_processes

HEADS = {"task.encoder.layer.self_attention": 6}
FACTS: dict[str, Any] = {"num_heads": HEADS, "num_key_value_heads": HEADS, "num_units": 10, "rows": 16}

REFUSED = [
    ("heads that `tensor`", {"tensor": 4}, {}),
    ("key heads", {"tensor": 2}, {"num_heads": {"a": 6}, "num_key_value_heads": {"a": 3}}),
    ("`context_method=ulysses`", {"context": 4, "context_method": "ulysses"}, {}),
    ("ZeRO 3 with `pipe`", {"pipe": 2, "zero.stage": 3, "pipeline.micro_batches": 2}, {}),
    ("ZeRO 2 with several", {"pipe": 2, "zero.stage": 2, "pipeline.schedule": "interleaved"}, {}),
    ("ZeRO 1 with `zero.overlap`", {"zero.stage": 1, "zero.overlap": True}, {}),
    ("more stages than units", {"pipe": 4}, {"num_units": 3}),
    ("a `pipeline.split`", {"pipe": 2, "pipeline.split": (4, 5)}, {}),
    ("`pipeline.stages_per_rank`", {"pipe": 2, "pipeline.stages_per_rank": 2}, {}),
    ("too few micro-batches", {"pipe": 4, "pipeline.micro_batches": 2}, {}),
    (
        "`pipeline.schedule=zero_bubble_v` with `train.compile`",
        {"pipe": 2, "pipeline.schedule": "zero_bubble_v"},
        {"compiled": True},
    ),
    ("fewer rows", {}, {"rows": 2}),
    ("`expert` that does not", {"expert": 2}, {}),
    ("`context` with experts", {"context": 2}, {"limited_experts": frozenset({"task.moe"})}),
    ("hidden units", {"tensor": 2}, {"hidden_dims": {"task.ffn": 33}}),
    ("fewer tokens", {"tensor": 2}, {"vocab_size": 1}),
    ("`sequence` with rules", {"tensor": 2, "sequence": True, "rules": {"heads": "none"}}, {}),
    (
        "`pipeline.schedule=zero_bubble_v`",
        {"pipe": 2, "pipeline.schedule": "zero_bubble_v"},
        {"checkpointing": frozenset({"full"})},
    ),
    ("Adafactor with ZeRO", {"zero.stage": 1}, {"optimizer": "Adafactor"}),
]


def case(changes: dict[str, Any], facts: dict[str, Any]) -> tuple[Parallel.Params, Layout, ModelFacts]:
    params = Parallel.Params()
    for path, value in changes.items():
        params.set(path, value)
    model = params.pipe * params.context * params.tensor
    layout = Layout(
        data=8 // model, pipe=params.pipe, context=params.context, tensor=params.tensor, expert=params.expert
    )
    return params, layout, ModelFacts(**{**FACTS, **facts})


@pytest.mark.parametrize(
    ("what", "changes", "facts"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused_and_the_nearest_layout_works(what: str, changes: dict[str, Any], facts: dict[str, Any]) -> None:
    params, layout, known = case(changes, facts)
    rows = [refusal.what for refusal, _ in broken_rules(params, layout=layout, facts=known)]
    assert any(row.startswith(what) for row in rows), rows
    with pytest.raises(ParamsError) as error:
        check_layout(params, layout=layout, facts=known)
    text = str(error.value)
    assert ": must " in text and text.endswith(".")
    nearest = nearest_layout(params, layout=layout, facts=known)
    if not nearest:
        assert "No layout of as many processes works" in text
        return
    assert nearest in text
    for path, value in re.findall(r"parallel\.([\w.]+)=(\S+)", nearest):
        params.set_text(path, value)
    model = params.pipe * params.context * params.tensor
    works = Layout(
        data=8 // model, pipe=params.pipe, context=params.context, tensor=params.tensor, expert=params.expert
    )
    check_layout(params, layout=works, facts=known)


@pytest.mark.parametrize(
    ("what", "changes", "facts"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("asked", ["data", "processes"])
def test_a_run_that_starts_its_own_processes_starts_as_many_with_the_nearest(
    asked: str, what: str, changes: dict[str, Any], facts: dict[str, Any]
) -> None:
    params, layout, known = case(changes, facts)
    params.set(asked, layout.data if asked == "data" else 8)
    nearest = nearest_layout(params, layout=layout, facts=known, launched=False)
    for path, value in re.findall(r"parallel\.([\w.]+)=(\S+)", nearest):
        params.set_text(path, value)
    assert num_processes(params) == layout.world_size
    if nearest:
        check_layout(params, layout=resolve_layout(params, world_size=8), facts=known)


def test_data_ranks_are_named_where_no_launcher_says_how_many_processes_there_are() -> None:
    facts = ModelFacts(rows=16, num_heads={"a": 6}, num_units=10)

    def nearest(*, launched: bool, **changes: Any) -> str:
        params = Parallel.Params(**changes)
        layout = resolve_layout(params, world_size=20)
        return nearest_layout(params, layout=layout, facts=facts, launched=launched)

    assert nearest(data=20, launched=False) == "parallel.context=2 parallel.data=10"
    assert nearest(data=20, launched=True) == "parallel.context=2 parallel.data=0"
    assert nearest(tensor=4, launched=False) == "parallel.tensor=2 parallel.data=10"
    assert nearest(tensor=4, launched=True) == "parallel.tensor=2"
    assert nearest(tensor=4, processes=20, launched=False) == "parallel.tensor=2"


def test_every_row_is_tested() -> None:
    untested = [row.what for row in REFUSALS if not any(row.what.startswith(what) for what, _, _ in REFUSED)]
    assert untested == []


def test_the_message_is_one_line_with_rule_value_reason_and_remedy() -> None:
    params, layout, facts = case({"tensor": 4}, {})
    with pytest.raises(ParamsError) as error:
        check_layout(params, layout=layout, facts=facts)
    assert (
        str(error.value)
        .splitlines()[0]
        .startswith(
            "parallel.tensor: must be one of [1, 2, 3, 6] for task.encoder.layer.self_attention, but is 4. "
            "A head is computed by one rank."
        )
    )
    assert "parallel.tensor=2" in str(error.value)


def test_what_works_is_not_refused() -> None:
    for changes in ({}, {"tensor": 2}, {"pipe": 2, "zero.stage": 2}, {"zero.stage": 3}, {"context": 2}):
        params, layout, facts = case(changes, {})
        check_layout(params, layout=layout, facts=facts)
    for changes in ({"zero.stage": 1}, {"zero.stage": 3}, {"pipe": 2}, {"pipe": 2, "zero.stage": 2}):
        params, layout, facts = case({"expert": 2, **changes}, {"num_experts": {"task.moe": 4}})
        check_layout(params, layout=layout, facts=facts)
