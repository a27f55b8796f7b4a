"""Params of pipeline parallelism: the schedule, and how layers become stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megaseq.base import Configurable, Problem

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble_v"]


class Pipeline(Configurable):
    """How stages are made and scheduled; only its params are used."""

    class Params(Configurable.Params):
        schedule: Schedule = "1f1b"
        """gpipe (Huang et al. 2019), 1f1b (Narayanan et al. 2019), interleaved (Narayanan et al. 2021) or
        zero_bubble_v (Qi et al. 2024)."""
        micro_batches: int = 0
        """Parts that a rank's rows go through the pipeline in; 0: `train.accumulation`, at least one a stage."""
        stages_per_rank: int = 0
        """Stages of one rank; 0: what the schedule wants, 1 or 2."""
        split: tuple[int, ...] = ()
        """Units (embeddings, layers, loss) of each stage; empty: split by cost."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports negative counts."""
            yield from super().validate()
            for name in ("micro_batches", "stages_per_rank"):
                if getattr(self, name) < 0:
                    yield f"{name}: must not be negative, but is {getattr(self, name)}. Use 0 for automatic."

    params: Params


def stages_per_rank(params: Pipeline.Params) -> int:
    """Returns the stages of one rank: what is asked for, or what the schedule wants."""
    several = params.schedule in ("interleaved", "zero_bubble_v")
    return params.stages_per_rank or (2 if several else 1)


def micro_batches_of(params: Pipeline.Params, *, accumulation: int, ranks: int) -> int:
    """Returns the parts that a rank's rows go through a pipeline of `ranks` in."""
    return params.micro_batches or max(accumulation, ranks)
