"""Params as they should be used; mypy --strict finds nothing here."""

from __future__ import annotations

from typing import Literal

from megaseq.base import FROM_PARENT, REQUIRED, Configurable, NestedMap


class Norm(Configurable):
    class Params(Configurable.Params):
        dim: int = FROM_PARENT
        eps: float = 1e-6


class RMSNorm(Norm):
    pass


class FeedForward(Configurable):
    class Params(Configurable.Params):
        hidden_dim: int = REQUIRED
        kind: Literal["plain", "gated"] = "plain"
        norm: Norm.Params = RMSNorm.Params()
        post_norm: Norm.Params | None = None
        layers: dict[str, Norm.Params] = {}

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        width: int = p.hidden_dim
        self.norm: Norm = p.norm.replace(dim=width).instantiate()


class Named(Configurable):
    class Params(Configurable.Params):
        name: str = ""


class Both(Named, FeedForward):
    class Params(Named.Params, FeedForward.Params):
        kind = "gated"


p = Both.Params(name="x", hidden_dim=3, norm=RMSNorm.Params(dim=3))
p.layers["1"] = RMSNorm.Params()
copy: Both.Params = p.copy().freeze().replace(hidden_dim=4)
found: list[tuple[str, Norm.Params]] = p.find(Norm.Params)
ids: object = NestedMap(ids=1).ids
