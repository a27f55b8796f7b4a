"""Params: fields, types, copies, freezing, checks, trees."""

from __future__ import annotations

import copy
import enum
import pickle
from typing import Any

import pytest

from megaseq.base import FROM_PARENT, REQUIRED, Configurable, ParamsError
from megaseq.base.fields import doc_of, fields_of

from .zoo import Color, Layer, LayerNorm, Named, Norm, RMSNorm, Scalars, Stack, Task, task


def message(action: Any) -> str:
    """The text of the ParamsError that `action` raises."""
    with pytest.raises(ParamsError) as caught:
        action()
    return str(caught.value)


def test_a_default_child_is_copied_for_each_instance() -> None:
    one, two = Layer.Params(), Layer.Params()
    one.norm.eps = 3.0
    one.scalars.listed["b"] = (2.0,)
    assert two.norm.eps == 1e-5
    assert two.scalars.listed == {"a": (1.0,)}
    assert Layer.Params() == two


def test_keyword_construction_and_unknown_keyword() -> None:
    assert Layer.Params(hidden_dim=4).hidden_dim == 4
    with pytest.raises(TypeError):
        Layer.Params(4)  # type: ignore[misc]
    assert message(lambda: Layer.Params(hiden_dim=4)) == (  # type: ignore[call-arg]
        "hiden_dim: Layer has no such param; did you mean hidden_dim?"
    )


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("hiden_dim", "hidden_dim"), ("idden_dim", "hidden_dim"), ("hidden_din", "hidden_dim"), ("nrm", "norm")],
)
def test_a_typo_names_full_path_and_meant_param(typo: str, meant: str) -> None:
    p = task()
    expected = f"encoder.layer.{typo}: Layer has no such param; did you mean {meant}?"
    assert message(lambda: p.set(f"encoder.layer.{typo}", 1)) == expected
    assert message(lambda: setattr(p.encoder.layer, typo, 1)) == expected
    assert message(lambda: getattr(p.encoder.layer, typo)) == expected
    assert not hasattr(p.encoder.layer, typo)


def test_a_short_name_gets_a_suggestion_and_a_strange_one_the_list() -> None:
    assert message(lambda: setattr(RMSNorm.Params(), "ep", 1)) == "ep: RMSNorm has no such param; did you mean eps?"
    assert message(lambda: setattr(RMSNorm.Params(), "dm", 1)) == "dm: RMSNorm has no such param; did you mean dim?"
    assert message(lambda: setattr(RMSNorm.Params(), "q", 1)) == "q: RMSNorm has no such param; it has dim, eps."


def test_a_part_that_was_cut_out_still_knows_where_it_stood() -> None:
    p = task()
    part = p.encoder.layer.copy()
    assert message(lambda: setattr(part, "hiden_dim", 1)).startswith("encoder.layer.hiden_dim: ")
    p.layers["x"] = part
    assert part.params_path == "layers.x"


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("integer", True, "must be an int, but is True (bool)."),
        ("integer", 2.0, "must be an int, but is 2.0 (float). Write 2."),
        ("integer", "2", "must be an int, but is '2' (str)."),
        ("integer", None, "must be an int, but is None (NoneType)."),
        ("number", True, "must be a float, but is True (bool)."),
        ("number", 2**60 + 1, f"must be a float, but is {2**60 + 1} (int). A float cannot hold it exactly."),
        ("flag", 1, "must be a bool, but is 1 (int)."),
        ("text", "\ud800", "must be text that UTF-8 can write, but is '\\ud800'. Remove the lone surrogate."),
        ("maybe_int", "3", "must be an int or None, but is '3' (str)."),
        ("choice", "bb", "must be one of 'no', 'b', 1, but is 'bb'. Did you mean b?"),
        ("choice", True, "must be one of 'no', 'b', 1, but is True (bool)."),
        ("color", 1, "must be a Color, but is 1 (int)."),
        ("sizes", 3, "must be a tuple of int, but is 3 (int)."),
        ("pair", ("a",), "must have 2 items, but is of 1: ('a',)."),
        ("rates", {1: 1.0}, "must have keys of type str, but is 1. Write '1'."),
    ],
)
def test_every_write_checks_the_type(field: str, value: Any, text: str) -> None:
    p = task()
    before = p.copy()
    assert message(lambda: setattr(p.layer.scalars, field, value)) == f"layer.scalars.{field}: {text}"
    assert p == before


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("sizes", (1, "x"), "sizes.1"),
        ("pairs", [["a", 1], ["b", 2.5]], "pairs.1.1"),
        ("rates", {"a": "x"}, "rates.a"),
        ("tables", {"a": {"b.c": 1}}, 'tables.a["b.c"]'),
        ("rows", [{"a": None}], "rows.0.a"),
    ],
)
def test_items_of_containers_are_checked_with_their_path(field: str, value: Any, path: str) -> None:
    assert message(lambda: setattr(Scalars.Params(), field, value)).startswith(f"{path}: must be a")


def test_conversions_on_write() -> None:
    p = Scalars.Params(number=2, sizes=[3, 4], int_or_float=2, rates={"a": 1}, rows=[{"a": 1}])  # type: ignore[arg-type]
    assert type(p.number) is float
    assert p.sizes == (3, 4)
    assert type(p.int_or_float) is int
    assert type(p.rates["a"]) is float
    assert p.rows == ({"a": 1},)


def test_writes_into_a_dict_are_checked() -> None:
    p = task()
    assert message(lambda: p.layers.update(a=3)) == "layers.a: must be a Layer.Params, but is 3 (int)."  # type: ignore[arg-type]
    assert message(lambda: p.layers.__setitem__("a", Layer)) == (  # type: ignore[arg-type]
        f"layers.a: must be a Layer.Params, but is {Layer!r} (type). Write Layer.Params()."
    )
    p.layers["a"] = p.layer
    p.layers["a"].dropout = 0.5
    assert p.layer.dropout == 0.0
    assert p.layers.pop("a").dropout == 0.5
    assert p.layers == {}


def test_a_child_may_be_of_a_subclass_only() -> None:
    p = Layer.Params()
    p.norm = LayerNorm.Params()
    assert p.norm.cls is LayerNorm
    assert message(lambda: setattr(p, "norm", Named.Params())) == "norm: must be a Norm.Params, but is Named.Params."
    p.post_norm = RMSNorm.Params()
    p.post_norm = None


def test_params_written_in_two_places_do_not_share() -> None:
    p = task()
    norm = LayerNorm.Params()
    p.layer.norm = norm
    p.encoder.layer.norm = norm
    norm.eps = 0.5
    assert p.layer.norm.eps == 0.5, "the first place takes the object itself"
    assert p.encoder.layer.norm.eps == 1e-5
    p.layer.norm = p.layer.norm
    assert p.layer.norm is norm


def test_binding_to_the_class() -> None:
    assert Layer.Params().cls is Layer
    assert RMSNorm.Params is not Norm.Params
    assert RMSNorm.Params().cls is RMSNorm
    assert issubclass(RMSNorm.Params, Norm.Params)
    assert RMSNorm.Params.__qualname__ == "RMSNorm.Params"

    class Both(Named, Norm):
        pass

    assert set(fields_of(Both.Params)) == {"name", "dim", "eps"}
    assert Both.Params().cls is Both


def test_multiple_inheritance_and_changed_defaults() -> None:
    assert list(fields_of(Task.Params)) == ["num_layers", "layers", "layer", "norms", "name", "encoder"]
    assert Task.Params().num_layers == 4
    assert Stack.Params().num_layers == 2
    assert LayerNorm.Params().eps == 1e-5


def test_a_misspelt_default_of_a_subclass_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"Bad\.Params\.epz: must have a type.* Did you mean eps\?"):

        class Bad(Norm):
            class Params(Norm.Params):
                epz = 1e-3


def test_names_of_methods_and_types_that_params_cannot_hold_are_refused() -> None:
    with pytest.raises(ParamsError, match="must not have the name of a method of Params"):

        class Method(Configurable):
            class Params(Configurable.Params):
                check: int = 1  # type: ignore[assignment]

    class Unsupported(Configurable):
        class Params(Configurable.Params):
            anything: list[int] = REQUIRED

    assert "Unsupported.Params.anything: must have a type made of bool, int" in message(Unsupported.Params)

    class Reserved(enum.Enum):
        null = 1

    class WithEnum(Configurable):
        class Params(Configurable.Params):
            kind: Reserved = Reserved.null

    assert "must be an Enum whose names YAML reads as text" in message(WithEnum.Params)

    class WrongDefault(Configurable):
        class Params(Configurable.Params):
            count: int = "x"  # type: ignore[assignment]

    assert "WrongDefault.Params.count: must be an int, but is 'x' (str)." in message(WrongDefault.Params)


def test_copy_is_deep_and_equal() -> None:
    p = task().set("layers.1.dropout", 0.5)
    q = p.copy()
    assert q == p
    q.layers["1"].norm.eps = 7.0
    q.norms[1].eps = 7.0
    assert p.layers["1"].norm.eps == 1e-5
    assert p.norms[1].eps == 1e-5
    assert q != p
    assert copy.deepcopy(p) == p
    assert pickle.loads(pickle.dumps(p)) == p


def test_equality_tells_types_apart_and_finds_nan_equal() -> None:
    assert Scalars.Params(bool_or_int=1) != Scalars.Params(bool_or_int=True)
    assert Scalars.Params(int_or_float=1) != Scalars.Params(int_or_float=1.0)
    assert Scalars.Params(number=float("nan")) == Scalars.Params(number=float("nan"))
    assert RMSNorm.Params() != Norm.Params()


def test_freeze_is_deep() -> None:
    p = task().set("layers.1.dropout", 0.5)
    p.freeze()
    text = "must stay as it is once frozen, but is set to 2. Write to a copy()."
    assert message(lambda: setattr(p, "num_layers", 2)) == f"num_layers: {text}"
    assert message(lambda: setattr(p.layers["1"].norm, "eps", 2)) == f"layers.1.norm.eps: {text}"
    assert message(lambda: p.layer.scalars.rates.__setitem__("a", 2)) == f"layer.scalars.rates.a: {text}"
    for change in (p.layers.clear, lambda: p.layers.pop("1"), lambda: p.layers.__delitem__("1")):
        assert "once frozen" in message(change)
    assert "once frozen" in message(lambda: setattr(p.norms[0], "eps", 2))
    thawed = p.copy()
    thawed.layers["1"].norm.eps = 2
    assert p.frozen and not thawed.frozen
    assert not p.replace(num_layers=3).frozen


def test_instantiate_checks_everything_and_freezes_a_copy() -> None:
    p = Layer.Params(dropout=1.5)
    p.scalars.integer = 3
    assert message(p.instantiate) == (
        "hidden_dim: must be set, but is REQUIRED. It is: width between the two projections.\n"
        "dropout: must be in [0, 1), but is 1.5. Choose less.\n"
        "model_dim: must be filled by the owner, but is FROM_PARENT. Set it."
    )
    good = Layer.Params(hidden_dim=2, model_dim=2)
    made = good.instantiate()
    assert isinstance(made, Layer)
    assert made.params == good and made.params.frozen and not good.frozen
    assert made.params.norm.dim is FROM_PARENT, "children are filled when they are made"


def test_check_lists_the_problems_of_the_whole_tree() -> None:
    p = task()
    p.set("layers.3.dropout", 2.0).set("encoder.layer.hidden_dim", 3).set("layer.model_dim", 3)
    assert [str(problem) for problem in p.check()] == [
        "layers.3.dropout: must be in [0, 1), but is 2.0. Choose less.",
        "layer: must have an even width, but has not.",
        "encoder.layer.hidden_dim: must be even, but is 3. Add 1.",
    ]
    assert [problem.path for problem in Task.Params().check()] == ["layer.hidden_dim", "encoder.layer.hidden_dim"]


def test_get_by_path() -> None:
    p = task().set("layers.1.dropout", 0.5)
    p.layer.scalars.tables = {"a.b": {"": "x"}}
    assert p.get("layers.1.norm.eps") == 1e-5
    assert p.get("norms.1.dim") == 8
    assert p.get('layer.scalars.tables["a.b"][""]') == "x"
    assert p.get("norms.1.cls") is LayerNorm
    assert p.get("layers.7.hidden_dim") == 16
    assert "7" not in p.layers, "a look at the template does not write it"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("norms.2.eps", "norms.2: must be an index below 2, but is 2."),
        ("norms.x", "norms.x: must be an index below 2, but is x."),
        ("num_layers.x", "num_layers: must have params below it, such as x, but is 4 (int)."),
        ("layer.post_norm.eps", "layer.post_norm: must have params below it, such as eps, but is None (NoneType)."),
        (
            "layer.scalars.rates.a",
            "layer.scalars.rates: must have the key 'a', but is a dict with no keys. Add it first.",
        ),
        ("encoder.nrm", "encoder.nrm: Stack has no such param; did you mean norms?"),
        ("a..b", "a..b: must be names joined by dots, or [\"...\"] for other keys, but is 'a..b'. Mend the path."),
    ],
)
def test_get_of_a_wrong_path(path: str, text: str) -> None:
    assert message(lambda: task().get(path)) == text


def test_set_by_path_and_by_wildcard() -> None:
    p = task()
    assert p.set("layers.0.dropout", 0.1) is p
    p.set("layers.5.dropout", 0.1).set("layers.*.norm.eps", 0.5).set("norms.*.dim", 6).set("layer.scalars.sizes.1", 9)
    assert [layer.norm.eps for layer in p.layers.values()] == [0.5, 0.5]
    assert p.layers["5"].hidden_dim == 16, "an exception starts as a copy of the template"
    assert [norm.dim for norm in p.norms] == [6, 6]
    assert p.layer.scalars.sizes == (1, 9)
    assert p.layer.norm.eps == 1e-5
    assert message(lambda: p.set("encoder.layers.*.dropout", 1)) == (
        "encoder.layers: must have items for the *, but is {}."
    )
    assert message(lambda: p.set("encoder.*.dropout", 1)).startswith('encoder["*"]: must stand for the items')


def test_find_visit_leaves() -> None:
    p = task().set("layers.1.dropout", 0.5)
    assert [path for path, _ in p.find(Layer)] == ["layers.1", "layer", "encoder.layer"]
    assert [path for path, _ in p.find(LayerNorm.Params)] == ["norms.1", "encoder.norms.1"]
    for _, norm in p.find(Norm):
        norm.eps = 0.25
    assert p.encoder.norms[0].eps == p.layers["1"].norm.eps == 0.25
    assert p.find(Task)[0][0] == ""
    seen: list[str] = []
    p.encoder.visit(lambda path, params: seen.append(f"{path}:{params.cls.__name__}"))
    assert seen[:3] == [":Stack", "layer:Layer", "layer.norm:RMSNorm"]
    leaves = dict(p.leaves())
    assert leaves["layers.1.dropout"] == 0.5
    assert leaves["layer.scalars.sizes"] == (1, 2)
    assert leaves["layer.scalars.rates"] == {}
    assert leaves["norms.1.dim"] == 8


def test_diff() -> None:
    p = task()
    q = p.copy().set("layers.1.norm.eps", 0.5).set("encoder.layer.norm.cls", LayerNorm).set("name", "u")
    lines = p.diff(q)
    assert 'name : "t" -> "u"' in lines
    assert "+ encoder.layer.norm.bias : true" in lines
    assert "encoder.layer.norm.cls : base.zoo.RMSNorm -> base.zoo.LayerNorm" in [
        line.replace("tests.base", "base") for line in lines
    ]
    assert "+ layers.1.norm.eps : 0.5" in lines
    assert "- layers.1.norm.eps : 0.5" in q.diff(p)
    assert p.diff(p.copy()) == []


def test_docs() -> None:
    assert task().doc("layers.3.norm.eps") == "Added to the variance,\nin fp32.\n\nMore about it."
    assert doc_of(LayerNorm.Params, "dim") == "Width of the input."
    assert task().doc("name") == ""


def test_rules_with_unset_params_are_skipped_and_sentinels_survive() -> None:
    assert Layer.Params().model_dim is FROM_PARENT
    assert pickle.loads(pickle.dumps(Layer.Params())).hidden_dim is REQUIRED
    assert copy.deepcopy(REQUIRED) is REQUIRED
    p = Layer.Params(hidden_dim=4)
    p.hidden_dim = REQUIRED
    assert len(p.check()) == 1


def test_enumeration_and_repr() -> None:
    assert repr(Scalars.Params(color=Color.GREEN)).startswith("Scalars.Params(integer=1, number=0.5")
    assert "hidden_dim" in dir(Layer.Params())
    assert "hidden_dim" in Layer.Params()


def test_setting_below_none_says_which_class_to_set_first() -> None:
    p = task()
    text = message(lambda: p.set("layer.post_norm.eps", 1e-3))
    assert text.startswith("layer.post_norm: must have params below it, such as eps, but is None (NoneType). Set ")
    assert "layer.post_norm.cls=" in text and text.endswith(" first.")
