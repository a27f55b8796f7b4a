"""Cutting a row of units into runs of about equal cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def balance(costs: Sequence[float], *, parts: int) -> tuple[int, ...]:
    """Returns the lengths of `parts` runs of `costs`, none empty, whose dearest run is as cheap as can be.

    Of those, the one with the least sum of squares: where one unit sets the pace, the others still share what is left.

    Args:
        costs: of each unit, not negative; at least `parts` of them.
        parts: runs.

    Raises:
        ValueError: there are fewer units than parts.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise ValueError(f"balance: must get at least one unit for each of {parts} parts, but gets {count}.")
    sums = [0.0, *itertools.accumulate(costs)]
    dearest = _best(sums, parts=parts, limit=float("inf"), squared=False)[0]
    # Sums of floats in another order differ in the last bits.
    bounds = _best(sums, parts=parts, limit=dearest * (1 + 1e-9), squared=True)[1]
    return tuple(stop - start for start, stop in itertools.pairwise(bounds))


def _best(sums: Sequence[float], *, parts: int, limit: float, squared: bool) -> tuple[float, list[int]]:
    """Returns the least total and its bounds; totals are the largest cost of a run, or the sum of their squares."""
    count = len(sums) - 1
    infinite = float("inf")
    best = [0.0] + [infinite] * count
    choices: list[list[int]] = []
    for part in range(1, parts + 1):
        row, choice = [infinite] * (count + 1), [0] * (count + 1)
        for stop in range(part, count - (parts - part) + 1):
            for start in range(part - 1, stop):
                cost = sums[stop] - sums[start]
                if cost > limit or best[start] == infinite:
                    continue
                total = best[start] + cost * cost if squared else max(best[start], cost)
                if total < row[stop]:
                    row[stop], choice[stop] = total, start
        best = row
        choices.append(choice)
    bounds = [count]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return best[count], bounds[::-1]
