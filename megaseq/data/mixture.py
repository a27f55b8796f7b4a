"""Several sources in one training stream, by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megaseq.base import Configurable
from megaseq.data.problem import data_error
from megaseq.data.source import Source


class Component(NamedTuple):
    """One source of an input; the name is empty where there is only one."""

    name: str
    source: Source


class Mixture(Configurable):
    """Sources by name, drawn from by weight; each repeats its own epochs, in which each of its examples comes once.

    A mixture's epoch has as many draws as all sources have examples together, and its parts are exact, not drawn by
    chance.
    """

    class Params(Configurable.Params):
        sources: dict[str, Source.Params] = {}
        """The sources by name."""
        weights: dict[str, float] = {}
        """Relative weights by name, for all sources or none; empty weighs by size and `temperature`."""
        temperature: float = 1.0
        """Without `weights`: weight = size ** (1 / temperature), so that more than 1 favours small sources
        (Arivazhagan et al. 2019)."""

        def validate(self) -> Iterator[Any]:
            yield from super().validate()
            if not self.sources:
                yield "sources: must have at least one source, but is empty. Add one by name."
            if self.weights and set(self.weights) != set(self.sources):
                names = ", ".join(sorted(set(self.weights) ^ set(self.sources)))
                yield f"weights: must name the same sources as `sources`, but is different at {names}. Name them all."
            if any(weight < 0 for weight in self.weights.values()) or (self.weights and not any(self.weights.values())):
                yield f"weights: must not be negative and not all 0, but is {dict(self.weights)}. Set positive numbers."
            if self.temperature <= 0:
                yield f"temperature: must be positive, but is {self.temperature}. Set 1 for the sources' sizes."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.components = tuple(Component(name, source.instantiate()) for name, source in p.sources.items())

    def draws(self, sizes: Sequence[int]) -> list[int]:
        """Returns how often an epoch draws from each source: sum(sizes) in all, by weight, by largest remainder."""
        p = self.params
        weights = [size ** (1 / p.temperature) for size in sizes]
        if p.weights:
            weights = [p.weights[component.name] for component in self.components]
        return apportion(sum(sizes), weights=weights)


def apportion(total: int, *, weights: Sequence[float]) -> list[int]:
    """Splits `total` in whole parts proportional to `weights`, by largest remainder; ties go to the first."""
    scale = sum(weights)
    exact = [total * weight / scale for weight in weights]
    parts = [int(part) for part in exact]
    ranked = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in ranked[: total - sum(parts)]:
        parts[i] += 1
    return parts


def components(p: Source.Params | Mixture.Params) -> tuple[Component, ...]:
    """Returns the sources that `p` describes."""
    built = p.instantiate()
    if isinstance(built, Mixture):
        return built.components
    if isinstance(built, Source):
        return (Component("", built),)
    raise data_error("source", "be a source or a mixture", type(built).__name__, "Set its class to one of these")
