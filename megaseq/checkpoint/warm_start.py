"""Starting a run from the parameters of another."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megaseq.base import REQUIRED, Configurable
from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.average import EMA_PREFIX, Weights
from megaseq.checkpoint.piece import Piece, as_pieces
from megaseq.checkpoint.ranks import Ranks
from megaseq.checkpoint.reading import OpenCheckpoint


class WarmStartRule(Configurable):
    """Says under what name the other checkpoint has the parameters whose path matches a pattern."""

    class Params(Configurable.Params):
        pattern: str = REQUIRED
        """Regular expression, found anywhere in the full path of this run's parameter (`re.search`)."""
        replacement: str = REQUIRED
        """What stands in the other's path in place of the match; groups as \\1."""

    params: Params


class WarmStart(Configurable):
    """Loads parameters from another run's checkpoint when a run begins.

    The first rule whose pattern is found in a parameter's path names its source: the path with the match replaced. A
    parameter that no rule matches keeps its own initial value. Without rules every parameter is loaded under its own
    path.
    """

    class Params(Configurable.Params):
        path: str = REQUIRED
        """Checkpoint, or run directory, of the other run."""
        rules: tuple[WarmStartRule.Params, ...] = ()
        """Which parameters, and where they come from."""
        weights: Weights = "auto"
        """Parameters, moving averages ("ema"), or the latter where there are any ("auto")."""

    params: Params

    def load(
        self, named_parameters: Mapping[str, Tensor] | Sequence[Piece], *, ranks: Ranks | None = None
    ) -> WarmStartReport:
        """Loads into `named_parameters` in place; see `init_from`."""
        rules = [(rule.pattern, rule.replacement) for rule in self.params.rules]
        weights = self.params.weights
        return init_from(self.params.path, named_parameters=named_parameters, rules=rules, weights=weights, ranks=ranks)


@dataclass(frozen=True)
class WarmStartReport:
    """What was loaded from where."""

    path: str
    loaded: Mapping[str, str]
    """Source by parameter."""
    kept: tuple[str, ...]
    """Parameters that keep their initial values."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that were not asked for."""

    def summary(self) -> str:
        """Returns one line: the counts, and the first parameters that keep their initial values."""
        kept = f" ({', '.join(self.kept[:3])}{', ...' if len(self.kept) > 3 else ''})" if self.kept else ""
        return (
            f"{self.path}: {len(self.loaded)} parameters loaded, {len(self.kept)} keep their initial values{kept}, "
            f"{len(self.unused)} of the checkpoint not used"
        )

    def __str__(self) -> str:
        """A line of counts, and one for each parameter that was loaded under another name or kept."""
        lines = [f"{self.path}: {len(self.loaded)} loaded, {len(self.kept)} kept, {len(self.unused)} unused"]
        lines += [f"  {name} <- {source}" for name, source in self.loaded.items() if name != source]
        lines += [f"  {name} keeps its initial value" for name in self.kept]
        return "\n".join(lines)


def init_from(
    path: str | os.PathLike[str],
    *,
    named_parameters: Mapping[str, Tensor] | Sequence[Piece],
    rules: Sequence[tuple[str, str]] = (),
    weights: Weights = "auto",
    ranks: Ranks | None = None,
) -> WarmStartReport:
    """Loads parameters from another checkpoint, in place; all or none.

    Args:
        path: Checkpoint, or run directory, of the other run; on whatever layout that was.
        named_parameters: This run's, by full path; or the pieces that this rank has of them.
        rules: (pattern, replacement) pairs, see `WarmStart`; none loads everything under its own path.
        weights: Which values of the other run.
        ranks: That call this together, each with its pieces; None is this process alone.

    Returns:
        What was done to the parameters of all ranks.

    Raises:
        CheckpointError: When a rule matches nothing, a source is missing, or a shape differs; raised on all ranks.
    """
    ranks = ranks or Ranks(alone=True)
    pieces = as_pieces(named_parameters)
    opened = ranks.together(lambda: OpenCheckpoint(path))
    shapes: dict[str, tuple[int, ...]] = {}
    for of_rank in ranks.gather({piece.name: piece.global_shape for piece in pieces}):
        shapes.update(of_rank)
    sources, kept = _sources(shapes, rules=rules or [("^", "")])
    problems: list[str] = []
    reads: dict[str, str] = {}
    for name, source in sources.items():
        averaged = EMA_PREFIX + source
        stored = averaged if weights == "ema" or (weights == "auto" and averaged in opened.entries) else source
        reads[name] = stored
        entry = opened.entries.get(stored)
        if entry is None:
            problems.append(f"{stored}, for {name}, is not in it")
        elif tuple(entry.size) != shapes[name]:
            problems.append(f"{stored} is {list(entry.size)}, but {name} is {list(shapes[name])}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{opened.path}: must hold what the rules ask for, but {'; '.join(problems[:3])}{more}. Mend the rules."
        )
    wanted = [replace(piece, name=reads[piece.name]) for piece in pieces if piece.name in reads]
    opened.read_pieces(wanted, ranks=ranks)
    used = set(reads.values())
    unused = tuple(n for n in opened.entries if n not in used and not n.startswith(("learner.", EMA_PREFIX)))
    return WarmStartReport(path=str(opened.path), loaded=reads, kept=kept, unused=unused)


def _sources(names: Collection[str], *, rules: Sequence[tuple[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the source of each parameter that a rule matches, and the parameters that none does."""
    compiled = []
    for pattern, replacement in rules:
        try:
            compiled.append((re.compile(pattern), replacement))
        except re.error as error:
            raise CheckpointError(
                f"warm start rule {pattern!r}: must be a regular expression, but is not ({error}). Write a dot as \\."
            ) from None
    sources: dict[str, str] = {}
    used: set[int] = set()
    for name in names:
        for index, (expression, replacement) in enumerate(compiled):
            if expression.search(name):
                try:
                    sources[name] = expression.sub(replacement, name, count=1)
                except (re.error, IndexError) as error:
                    raise CheckpointError(
                        f"warm start rule {expression.pattern!r}: must have groups that exist in its replacement, "
                        f"but has {replacement!r} ({error}). Write the first group as \\1."
                    ) from None
                used.add(index)
                break
    for index, (expression, _) in enumerate(compiled):
        if index not in used:
            raise CheckpointError(
                f"warm start rule {expression.pattern!r}: must be the first to match some parameter, but is for none. "
                "Remove it or mend its pattern."
            )
    return sources, tuple(name for name in names if name not in sources)
