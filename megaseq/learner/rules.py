"""Which parameters train, and how: rules by regular expression on the full parameter path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megaseq.base import REQUIRED, Configurable, Problem
from megaseq.base.errors import ParamsError
from megaseq.learner.optimizer import ParameterGroup


class ParameterRule(Configurable):
    """Weight decay or learning-rate scale for the parameters whose path matches a pattern."""

    class Params(Configurable.Params):
        pattern: str = REQUIRED
        """Regular expression, found anywhere in the full path of the parameter (`re.search`)."""
        weight_decay: float | None = None
        """Weight decay of the parameters; None leaves it to later rules and the default."""
        learning_rate_scale: float | None = None
        """Factor of their learning rate; None leaves it to later rules and the default, 1."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a rule that sets nothing."""
            yield from super().validate()
            if self.weight_decay is None and self.learning_rate_scale is None:
                yield (
                    "weight_decay: must be set, or learning_rate_scale, but both are None. Remove the rule or set one."
                )

    params: Params


@dataclass(frozen=True)
class Match:
    """A pattern, what it does, and the parameters it does that to."""

    role: str
    pattern: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """The outcome of all rules."""

    groups: tuple[ParameterGroup, ...]
    frozen: tuple[str, ...]
    matches: tuple[Match, ...]


def assign(
    named_parameters: Mapping[str, Tensor],
    *,
    freeze: Sequence[str],
    train_only: Sequence[str],
    rules: Sequence[ParameterRule.Params],
    weight_decay: float,
    weight_decay_min_dims: int,
    known: Sequence[str] = (),
) -> Assignment:
    """Sorts the parameters into frozen ones and groups of equal treatment.

    A parameter is frozen when a pattern of `freeze` matches it, or when there are patterns in `train_only` and none
    matches. Of the rules, the first that matches and sets a value wins, for each value by itself. Without a rule the
    decay is `weight_decay` for tensors of at least `weight_decay_min_dims` dimensions and 0 for smaller ones.

    Args:
        named_parameters: What this process holds, by path.
        freeze: Patterns.
        train_only: Patterns.
        rules: In order.
        weight_decay: Default.
        weight_decay_min_dims: Of the default.
        known: Paths of the whole model, where processes hold different parts of it; empty: `named_parameters` is all.

    Raises:
        ParamsError: When a pattern is not a regular expression or matches no parameter of the whole model, or when
            nothing of it would train.
    """
    names = list(dict.fromkeys((*known, *named_parameters)))
    matches: list[Match] = []

    def search(pattern: str, *, role: str, path: str) -> set[str]:
        found = _search(pattern, names=names, path=path)
        here = tuple(name for name in found if name in named_parameters)
        matches.append(Match(role=role, pattern=pattern, names=here))
        return set(found)

    frozen: set[str] = set()
    for index, pattern in enumerate(freeze):
        frozen |= search(pattern, role="freeze", path=f"learner.freeze_patterns.{index}")
    if train_only:
        trained: set[str] = set()
        for index, pattern in enumerate(train_only):
            trained |= search(pattern, role="train", path=f"learner.train_only_patterns.{index}")
        frozen |= set(names) - trained
    matched = [
        (rule, search(rule.pattern, role=_role(rule), path=f"learner.rules.{index}.pattern"))
        for index, rule in enumerate(rules)
    ]
    if len(frozen) == len(names):
        raise ParamsError(
            f"learner.freeze_patterns: must leave a parameter to train, but all {len(names)} are frozen. Narrow "
            f"the patterns."
        )
    trainable = {name: tensor for name, tensor in named_parameters.items() if name not in frozen}
    groups = _groups(trainable, matched=matched, weight_decay=weight_decay, weight_decay_min_dims=weight_decay_min_dims)
    kept = tuple(name for name in named_parameters if name in frozen)
    return Assignment(groups=groups, frozen=kept, matches=tuple(matches))


def _groups(
    trainable: Mapping[str, Tensor],
    *,
    matched: Sequence[tuple[ParameterRule.Params, set[str]]],
    weight_decay: float,
    weight_decay_min_dims: int,
) -> tuple[ParameterGroup, ...]:
    """Returns parameters of equal treatment together; `matched` has each rule with the names that it is for."""
    treatments: dict[tuple[float, float], list[str]] = {}
    for name, tensor in trainable.items():
        decay = next((r.weight_decay for r, found in matched if name in found and r.weight_decay is not None), None)
        if decay is None:
            decay = weight_decay if tensor.dim() >= weight_decay_min_dims else 0.0
        scales = (r.learning_rate_scale for r, found in matched if name in found)
        scale = next((scale for scale in scales if scale is not None), 1.0)
        treatments.setdefault((decay, scale), []).append(name)
    return tuple(
        ParameterGroup(
            names=tuple(members),
            tensors=tuple(trainable[name] for name in members),
            weight_decay=decay,
            learning_rate_scale=scale,
        )
        for (decay, scale), members in treatments.items()
    )


def _search(pattern: str, *, names: Sequence[str], path: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ParamsError(
            f"{path}: must be a regular expression, but is {pattern!r} ({error}). Write a dot of the path as \\."
        ) from None
    found = [name for name in names if compiled.search(name)]
    if not found:
        example = names[0] if names else "none"
        raise ParamsError(
            f"{path}: must match a parameter, but is {pattern!r}, which matches none of {len(names)}. "
            f"Paths look like {example}."
        )
    return found


def _role(rule: ParameterRule.Params) -> str:
    parts = []
    if rule.weight_decay is not None:
        parts.append(f"weight_decay={rule.weight_decay:g}")
    if rule.learning_rate_scale is not None:
        parts.append(f"learning_rate_scale={rule.learning_rate_scale:g}")
    return " ".join(parts)


def listing(assignment: Assignment, *, named_parameters: Mapping[str, Tensor]) -> str:
    """Returns a table for people: each pattern with what it matched, the groups that came of it, every parameter."""
    lines = ["patterns (re.search on the full path):"]
    for match in assignment.matches:
        lines.append(f"  {match.role}  {match.pattern}  -> {_count(match.names, named_parameters)}")
        lines.extend(f"    {name}" for name in match.names)
    if not assignment.matches:
        lines.append("  none")
    lines.append("groups:")
    for group in assignment.groups:
        treatment = f"weight_decay={group.weight_decay:g} learning_rate_scale={group.learning_rate_scale:g}"
        lines.append(f"  {treatment}  -> {_count(group.names, named_parameters)}")
    lines.append(f"  frozen  -> {_count(assignment.frozen, named_parameters)}")
    treatments = {
        name: f"weight_decay={group.weight_decay:g} learning_rate_scale={group.learning_rate_scale:g}"
        for group in assignment.groups
        for name in group.names
    }
    lines.append("parameters:")
    for name, tensor in named_parameters.items():
        patterns = ", ".join(match.pattern for match in assignment.matches if name in match.names)
        by = f"  by {patterns}" if patterns else ""
        lines.append(f"  {name}  {list(tensor.shape)}  {treatments.get(name, 'frozen')}{by}")
    return "\n".join(lines)


def _count(names: Sequence[str], named_parameters: Mapping[str, Tensor]) -> str:
    return f"{len(names)} parameters, {sum(named_parameters[name].numel() for name in names):,} elements"
