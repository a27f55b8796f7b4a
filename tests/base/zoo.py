"""Configurable classes of every kind of field, for the tests of params."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Literal

from megaseq.base import FROM_PARENT, REQUIRED, Configurable, Params, Problem


class Color(enum.Enum):
    """An enumeration with names that YAML could take for something else."""

    RED = 1
    GREEN = 2
    no = 3


class Norm(Configurable):
    """Base of norms."""

    class Params(Configurable.Params):
        dim: int = FROM_PARENT
        """Width of the input."""
        eps: float = 1e-6
        """Added to the variance,
        in fp32.

        More about it.
        """


class RMSNorm(Norm):
    """Without Params of its own."""


class LayerNorm(Norm):
    """With one more param."""

    class Params(Norm.Params):
        bias: bool = True
        eps = 1e-5


class Scalars(Configurable):
    """Every kind of leaf."""

    class Params(Configurable.Params):
        integer: int = 1
        number: float = 0.5
        flag: bool = False
        text: str = "plain"
        maybe_text: str | None = None
        maybe_int: int | None = None
        text_or_number: float | str = "x"
        int_or_float: int | float = 3
        bool_or_int: bool | int = 1
        choice: Literal["no", "b", 1] = "b"
        color: Color = Color.RED
        color_or_text: Color | str | None = None
        sizes: tuple[int, ...] = (1, 2)
        pair: tuple[str, float] = ("a", 1.0)
        pairs: tuple[tuple[str, int | None], ...] = ()
        rates: dict[str, float] = {}
        tables: dict[str, dict[str, str]] = {}
        rows: tuple[dict[str, int], ...] = ()
        listed: dict[str, tuple[float, ...]] = {"a": (1.0,)}


class Layer(Configurable):
    """A layer with children."""

    class Params(Configurable.Params):
        model_dim: int = FROM_PARENT
        """Width of input and output."""
        hidden_dim: int = REQUIRED
        """Width between the two projections."""
        norm: Norm.Params = RMSNorm.Params(eps=1e-5)
        post_norm: Norm.Params | None = None
        scalars: Scalars.Params = Scalars.Params()
        dropout: float = 0.0

        def validate(self) -> Iterator[Problem | str]:
            yield from super().validate()
            if not 0 <= self.dropout < 1:
                yield Problem(path="dropout", rule="be in [0, 1)", value=self.dropout, remedy="Choose less")
            if self.hidden_dim % 2:
                yield f"hidden_dim: must be even, but is {self.hidden_dim}. Add 1."
            if self.model_dim % 2:
                yield "must have an even width, but has not."


class Stack(Configurable):
    """A template, exceptions to it, and a tuple of params."""

    class Params(Configurable.Params):
        num_layers: int = 2
        layers: dict[str, Layer.Params] = {}
        layer: Layer.Params = Layer.Params()
        norms: tuple[Norm.Params, ...] = (RMSNorm.Params(), LayerNorm.Params(dim=8))

        def default_item(self, field: str, key: str) -> Params | None:
            return self.layer if field == "layers" else None


class Named(Configurable):
    """Something with a name."""

    class Params(Configurable.Params):
        name: str = ""


class Task(Named, Stack):
    """Two parents."""

    class Params(Named.Params, Stack.Params):
        encoder: Stack.Params = Stack.Params()
        num_layers = 4


def task() -> Task.Params:
    """Params with everything that is REQUIRED."""
    p = Task.Params(name="t")
    p.layer.hidden_dim = 16
    p.encoder.layer.hidden_dim = 32
    return p
