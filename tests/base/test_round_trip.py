"""Text and YAML of any params turn back into equal params."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import FROM_PARENT, Params, params_from_yaml

from .zoo import Color, LayerNorm, Norm, RMSNorm, Scalars, Stack, Task

# Texts that some reader takes for something else, and any other.
ODD_TEXTS = ["", " ", "a : b", "a  # b", "#", '"', "'", "\\", "a\nb", "\n", "\t", "\x85", "\u2028", "\ufeff", "😀"]
ODD_TEXTS += ["no", "1e-4", "null", "~", "true", "REQUIRED", "FROM_PARENT", "0x1", "1_0", ".5", "=", "2001-01-01"]
ODD_TEXTS += ["- a", "{", "[1]", "!remove", "*", "&a", "%", "@", "`", "? a", "---", "..."]
texts = st.text(max_size=12) | st.sampled_from(ODD_TEXTS)
keys = texts | st.sampled_from(["cls", "3", "a.b", "<<", "a b"])
numbers = st.floats(allow_nan=True, allow_infinity=True)
integers = st.integers(-(2**70), 2**70)
norms = st.builds(RMSNorm.Params, dim=integers, eps=numbers) | st.builds(
    LayerNorm.Params, bias=st.booleans(), eps=numbers
)


def changes(**values: Any) -> Any:
    """Some of the fields, any of them left at its default."""
    return st.fixed_dictionaries({}, optional=values)


scalar_values = changes(
    integer=integers | st.just(FROM_PARENT),
    number=numbers,
    flag=st.booleans(),
    text=texts | st.just(FROM_PARENT),
    maybe_text=st.none() | texts,
    maybe_int=st.none() | integers,
    text_or_number=texts | numbers,
    int_or_float=integers | numbers,
    bool_or_int=st.booleans() | integers,
    choice=st.sampled_from(["no", "b", 1]),
    color=st.sampled_from(Color),
    color_or_text=st.none() | texts | st.sampled_from(Color) | st.just("RED"),
    sizes=st.lists(integers, max_size=3),
    pair=st.tuples(texts, numbers),
    pairs=st.lists(st.tuples(texts, st.none() | integers), max_size=2),
    rates=st.dictionaries(keys, numbers, max_size=3),
    tables=st.dictionaries(keys, st.dictionaries(keys, texts, max_size=2), max_size=2),
    rows=st.lists(st.dictionaries(keys, integers, max_size=2), max_size=2),
    listed=st.dictionaries(keys, st.lists(numbers, max_size=2), max_size=2),
)
scalars = scalar_values.map(lambda values: Scalars.Params(**values))
layer_values = changes(
    model_dim=integers, hidden_dim=integers, norm=norms, post_norm=st.none() | norms, scalars=scalars, dropout=numbers
)


@st.composite
def tasks(draw: Any) -> Task.Params:
    """A task whose every part may differ from the defaults."""
    p = Task.Params(name=draw(texts))
    for stack in (p, p.encoder):
        for name, value in draw(layer_values).items():
            setattr(stack.layer, name, value)
        for key in draw(st.lists(keys, max_size=2, unique=True)):
            layer = stack.layer.copy()
            for name, value in draw(layer_values).items():
                setattr(layer, name, value)
            stack.layers[key] = layer
        stack.norms = draw(st.lists(norms, max_size=3).map(tuple))
    return p


def same_order(one: Params, other: Params) -> bool:
    """Equality, and dicts in the same order."""
    return one == other and [path for path, _ in one.leaves()] == [path for path, _ in other.leaves()]


@settings(max_examples=15, deadline=None)
@given(p=tasks())
def test_text_round_trip(p: Task.Params) -> None:
    assert same_order(Task.Params.from_text(p.to_text()), p)
    with_origins = p.to_text(origins=True)
    again = Task.Params.from_text(with_origins)
    assert same_order(again, p)
    assert again.to_text(origins=True) == with_origins
    assert p.to_text().encode() and all(line.count("\n") == 0 for line in p.to_text().split("\n"))


@settings(max_examples=15, deadline=None)
@given(p=tasks(), base=tasks())
def test_yaml_round_trip(p: Task.Params, base: Task.Params) -> None:
    assert params_from_yaml(p.to_yaml()) == p
    assert params_from_yaml(p.to_yaml(origins=True)) == p
    assert params_from_yaml(p.to_yaml(changed_only=True)) == p
    kept = base.copy()
    assert params_from_yaml(p.to_yaml(changed_only=True, base=base), base=base) == p
    assert base == kept
    assert base.apply_yaml(p.to_yaml(base=base)) == p


@settings(max_examples=15, deadline=None)
@given(p=tasks())
def test_equal_params_have_no_diff_and_no_changes(p: Task.Params) -> None:
    assert p.diff(p.copy()) == []
    assert len(p.to_yaml(changed_only=True, base=p.copy()).split("\n")) == 2, "the class and the last line's end"


@settings(max_examples=100, deadline=None)
@given(value=numbers)
def test_a_float_is_read_back_bit_for_bit(value: float) -> None:
    back = Scalars.Params.from_text(Scalars.Params(number=value).to_text()).number
    assert (math.isnan(value) and math.isnan(back)) or (value.hex() == back.hex())


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_a_text_of_the_command_line_stays(text: str) -> None:
    if not text.strip() or text.strip()[0] in "\"'!" or text.strip() in ("null", "~", "REQUIRED", "FROM_PARENT"):
        return
    assert Scalars.Params().set_text("text", text).text == text.strip()


def test_text_form() -> None:
    p = Stack.Params(num_layers=3)
    p.norms = (LayerNorm.Params(),)
    p.layer.scalars.rates = {"a.b": 0.5}
    lines = p.to_text().replace("tests.base", "base").split("\n")
    assert lines[:3] == ["cls : base.zoo.Stack", "num_layers : 3", "layers : {}"]
    assert "layer.model_dim : FROM_PARENT" in lines
    assert "layer.hidden_dim : REQUIRED" in lines
    assert "norms.0.cls : base.zoo.LayerNorm" in lines
    assert 'layer.scalars.rates["a.b"] : 0.5' in lines
    assert 'layer.scalars.pair : ["a", 1.0]' in lines
    assert "layer.post_norm : null" in lines
    assert lines[-1] == ""


def test_changed_only_names_what_differs_and_no_more() -> None:
    p = Stack.Params()
    p.layer.norm.eps = 0.5
    p.set("layers.1.dropout", 0.5).set("layers.2", p.layer)
    assert p.to_yaml(changed_only=True).split("\n")[1:] == [
        "layers:",
        "  1:",
        "    dropout: 0.5",
        "  2: {}",
        "layer:",
        "  norm:",
        "    eps: 0.5",
        "",
    ]
    assert issubclass(Norm.Params().cls, Norm)
