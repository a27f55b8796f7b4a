"""YAML overlays and the command line: YAML 1.2, types decide, every error with file and line."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megaseq.base import ParamsError, apply_overrides, params_from_yaml

from .zoo import Color, Layer, LayerNorm, Norm, RMSNorm, Scalars, Stack, Task, task

ZOO = Norm.__module__


def message(action: Any) -> str:
    """The text of the ParamsError that `action` raises."""
    with pytest.raises(ParamsError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("text", "no", "no"),
        ("text", "1e-4", "1e-4"),
        ("text", "007", "007"),
        ("text", "true", "true"),
        ("text", '"null"', "null"),
        ("text", "'it''s'", "it's"),
        ("text", "yes: it is  # so", None),
        ("number", "1e-4", 1e-4),
        ("number", "3", 3.0),
        ("number", ".inf", float("inf")),
        ("number", "-inf", float("-inf")),
        ("integer", "0o17", 15),
        ("integer", "0x1F", 31),
        ("integer", "+5", 5),
        ("flag", "True", True),
        ("maybe_text", "~", None),
        ("maybe_text", "no", "no"),
        ("maybe_int", "null", None),
        ("text_or_number", "1e-4", 1e-4),
        ("text_or_number", '"1e-4"', "1e-4"),
        ("int_or_float", "1", 1),
        ("int_or_float", "1.0", 1.0),
        ("choice", "no", "no"),
        ("choice", "1", 1),
        ("color", "no", Color.no),
        ("color_or_text", "RED", Color.RED),
        ("color_or_text", '"RED"', "RED"),
        ("sizes", "[1, 2, 3]", (1, 2, 3)),
        ("sizes", "[]", ()),
        ("pair", "[no, 1e-4]", ("no", 1e-4)),
        ("rates", "{a: 1, \"b.c\": 2}", {"a": 1.0, "b.c": 2.0}),
    ],
)  # fmt: skip
def test_the_type_decides_what_a_scalar_means(field: str, text: str, value: Any) -> None:
    if value is not None or text in ("~", "null"):
        p = Scalars.Params().apply_yaml(f"{field}: {text}")
        assert getattr(p, field) == value and isinstance(getattr(p, field), type(value))
    else:
        value = text
    q = Scalars.Params().set_text(field, text)
    assert getattr(q, field) == value and isinstance(getattr(q, field), type(value))


REFUSED = ["flag: yes", "flag: maybe", "flag: 1", "integer: 1.5", 'integer: "1"', "integer: 1_000", "text: null"]
REFUSED += ["text: [a]", "choice: off", "color: 1", "sizes: 3", "sizes: {a: 1}"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_of_the_type_is_refused(text: str) -> None:
    name = text.split(":")[0]
    assert message(lambda: Scalars.Params().apply_yaml(text, filename="a.yaml")).startswith(
        f"a.yaml:1: {name}: must be "
    )


@pytest.mark.parametrize("pattern", [r".*\.bias$", "*", "[a-z]+", "a: b", "%", "@x", "`", "{", "a #b", "-", "!x", "&a"])
def test_a_text_on_the_command_line_needs_no_quotes(pattern: str) -> None:
    assert Scalars.Params().set_text("text", pattern).text == pattern
    assert Scalars.Params().set_text("text", "").text == ""


def test_all_errors_of_a_file_at_once_with_their_lines() -> None:
    text = "nam: x\nencoder:\n  layer:\n    hiden_dim: 3\n    norm: {eps: x}\n  num_layers: 2.5\n"
    assert message(lambda: task().apply_yaml(text, filename="over.yaml")).split("\n") == [
        "over.yaml:1: nam: Task has no such param; did you mean name?",
        "over.yaml:4: encoder.layer.hiden_dim: Layer has no such param; did you mean hidden_dim?",
        "over.yaml:5: encoder.layer.norm.eps: must be a float, but is 'x' (str).",
        "over.yaml:6: encoder.num_layers: must be an int, but is 2.5 (float).",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "name: a\nencoder:\n  num_layers: 1\n  layer: {}\n  num_layers: 2\n",
            "a.yaml:5: num_layers: must occur once in its map, but is also in line 3. Remove one of the two.",
        ),
        ("name: [a\n", "a.yaml:2: must be YAML, but is not: while parsing a flow sequence"),
        ("- a\n", "a.yaml:1: must be a map of param names, but is ['a']. Write name: value."),
        ("name: !!python/object:os.system x\n", "a.yaml:1: must have no tag but !remove, but is !!python/object"),
        ("encoder: &x\n  layer: *x\n", "a.yaml:1: must be a tree, but is an alias of what contains it."),
        ("name: a\n---\nname: b\n", "must be YAML, but is not: expected a single document"),
        ("[a]: b\n", "a.yaml:1: must have scalars as keys, but is a list or a map."),
        ("name: \x00\n", "a.yaml: must be YAML, but is not: "),
        ("layer: 3\n", "a.yaml:1: layer: must be a Layer.Params, but is 3 (int)."),
        ("name: !remove\n", "a.yaml:1: name: must be a value, but is !remove. Only an item of a dict can be removed."),
        ("layers: {x: !remove }\n", "a.yaml:1: layers: must have the key 'x', but is a dict with no keys."),
    ],
)
def test_broken_yaml(text: str, expected: str) -> None:
    assert expected in message(lambda: task().apply_yaml(text, filename="a.yaml"))


def test_an_empty_overlay_changes_nothing() -> None:
    assert task().apply_yaml("# nothing\n") == task()


def test_merging_of_children_dicts_and_tuples() -> None:
    p = task()
    p.layers["1"] = Layer.Params(hidden_dim=2)
    p.layers["9"] = Layer.Params(hidden_dim=2)
    norm = p.layer.norm
    # `layers` stands before `layer`: the new item starts from the template as this file leaves it all the same.
    p.apply_yaml(
        "layers:\n  1: {dropout: 0.5}\n  2: {model_dim: 4}\n  9: !remove\n"
        "layer:\n  hidden_dim: 64\n  norm: {eps: 0.5}\n"
        "norms:\n  1: {bias: false}\n"
    )
    assert p.layer.norm is norm and norm.eps == 0.5
    assert list(p.layers) == ["1", "2"]
    assert (p.layers["1"].hidden_dim, p.layers["1"].dropout) == (2, 0.5)
    assert (p.layers["2"].hidden_dim, p.layers["2"].model_dim) == (64, 4)
    assert p.norms[1].get("bias") is False and p.norms[1].dim == 8
    p.apply_yaml(f"norms: [{{cls: {ZOO}.LayerNorm}}, {{eps: 3}}]")
    assert [norm.cls for norm in p.norms] == [LayerNorm, Norm]


def test_overlays_in_order_then_the_command_line() -> None:
    p = task().apply_yaml("num_layers: 5\nname: a").apply_yaml("num_layers: 6")
    apply_overrides(
        p, assignments=["num_layers=7", "layers.3.dropout=1e-1", "encoder.layer.post_norm.cls=" + ZOO + ".RMSNorm"]
    )
    assert (p.num_layers, p.name, p.layers["3"].dropout) == (7, "a", 0.1)
    assert p.encoder.layer.post_norm is not None and p.encoder.layer.post_norm.cls is RMSNorm
    apply_overrides(p, assignments=["layers.3=!remove", "layers.4={dropout: 0.25}", "layers.*.norm.eps=3"])
    assert list(p.layers) == ["4"] and p.layers["4"].norm.eps == 3
    assert message(lambda: apply_overrides(p, assignments=["num_layers=x", "nam=3", "name"])).split("\n") == [
        "num_layers: must be an int, but is 'x' (str).",
        "nam: Task has no such param; did you mean name?",
        "name: must be written path=value, but is without =. Write path=value.",
    ]


def test_a_class_swap_keeps_what_was_set_and_exists() -> None:
    p = task()
    p.layer.norm.dim = 12
    p.apply_yaml(f"layer:\n  norm:\n    cls: {ZOO}.LayerNorm\n    bias: false\n")
    assert p.layer.norm == LayerNorm.Params(dim=12, eps=1e-5, bias=False)
    q = Layer.Params(norm=Norm.Params())
    q.set("norm.cls", LayerNorm)
    assert q.norm.eps == 1e-5, "the default of the old class is not kept: nobody set it"
    q.norm.eps = 0.5
    q.set("norm.cls", f"{ZOO}.RMSNorm")
    assert q.norm == RMSNorm.Params(eps=0.5)
    q.set("norm.cls", RMSNorm)
    assert q.norm.params_path == "norm"


def test_a_swap_inside_a_tuple_and_a_dict() -> None:
    p = task().set("layers.1.dropout", 0.5)
    p.set("norms.0.cls", LayerNorm).set("layers.1.norm.cls", LayerNorm)
    assert p.norms[0].cls is LayerNorm and p.layers["1"].norm.cls is LayerNorm


FOREIGN = ["os.system", "os", "antigravity.Thing", "collections.OrderedDict", "x", "", "a b"]
FOREIGN += ["megaseq.base.paths.join", "megaseq.nowhere.Thing", "megaseq.base.params.source.sys"]


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_but_configurables_is_named_and_nothing_foreign_imported(name: str) -> None:
    before = {module for module in sys.modules if not module.startswith("megaseq")}
    text = message(lambda: task().set("layer.norm.cls", name))
    assert text.startswith(
        "layer.norm.cls: must name a Configurable class of megaseq or of a registered package, but is"
    )
    assert {module for module in sys.modules if not module.startswith("megaseq")} == before
    assert "antigravity" not in sys.modules


def test_a_class_must_fit_its_place_and_a_misspelt_one_is_guessed() -> None:
    assert (
        message(lambda: task().set("layer.norm.cls", Stack))
        == "layer.norm: must be a Norm.Params, but is Stack.Params."
    )
    text = message(lambda: task().apply_yaml(f"layer:\n  norm:\n    cls: {ZOO}.LayerNom\n", filename="a.yaml"))
    assert text.startswith("a.yaml:3: layer.norm.cls: ") and text.endswith(f"Did you mean {ZOO}.LayerNorm?")
    assert "stay as it is at the root" in message(lambda: task().set("cls", Stack))
    assert "stay as it is at the root" in message(lambda: task().apply_yaml(f"cls: {ZOO}.Stack"))


def test_a_module_of_megaseq_is_imported_for_its_class() -> None:
    from megaseq.base.swap import class_at

    assert class_at("megaseq.base.configurable.Configurable", path="x").__name__ == "Configurable"
    assert class_at("megaseq.base.Configurable", path="x").__name__ == "Configurable", "an exported name serves too"


def test_params_from_yaml_needs_a_class_or_a_base() -> None:
    assert params_from_yaml("", base=task()) == task()
    assert "Write cls: package.module.Class" in message(lambda: params_from_yaml("name: a"))
    assert "Write cls: package.module.Class" in message(lambda: params_from_yaml(""))
    assert params_from_yaml(f"cls: {ZOO}.Norm\ndim: 3") == Norm.Params(dim=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cls : {zoo}.Norm\ndim 3", "p.txt:2: must be of the form `path : value`, but is 'dim 3'. Mend the line."),
        (
            "cls : {zoo}.Norm\ndim : 3\ndim : 4",
            "p.txt:3: must set each path once, but is a second value, after line 2.",
        ),
        ("cls : {zoo}.Norm\ndmi : 3", "p.txt:2: dmi: Norm has no such param; did you mean dim?"),
        ("cls : {zoo}.Norm\ndim : x", "p.txt:2: dim: must be an int, but is 'x' (str)."),
        ("cls : {zoo}.Norm\ndim : [1", "p.txt:2: must have a YAML value, but is [1."),
        ("cls : {zoo}.Norm\ndim : 1\ndim.x : 2", "p.txt:3: must not lie below the value of dim, but is 'dim.x : 2'."),
        ("cls : os.system", "p.txt:1: cls: must name a Configurable class"),
    ],
)
def test_broken_text(text: str, expected: str) -> None:
    assert expected in message(lambda: Norm.Params.from_text(text.format(zoo=ZOO), filename="p.txt"))


def test_text_of_another_class_is_refused() -> None:
    assert "must be a Norm, but is Task" in message(lambda: Norm.Params.from_text(task().to_text()))
    assert Norm.Params.from_text(LayerNorm.Params().to_text()) == LayerNorm.Params()
    assert Task.Params.from_text('# a comment\n\nname : "x"  # here\n').name == "x"
