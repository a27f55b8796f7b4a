"""The memory that a run's ranks are going to need, for the lines that it begins with."""

from __future__ import annotations

from megaseq.base.errors import ParamsError
from megaseq.parallel.layout import Layout
from megaseq.train.experiment import Run
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.memory import gib
from megaseq.train.planning.search import rank_memory, stage_plan
from megaseq.train.planning.subject import Subject


def memory_lines(params: Run.Params, *, layout: Layout, precision: str) -> list[str]:
    """Returns a line with the estimate for the rank that needs most; none for models that cannot be estimated.

    Args:
        params: of the run.
        layout: of its processes.
        precision: fp32, bf16 or bf16_autocast.
    """
    parallel = params.parallel
    candidate = Candidate(
        parallel=parallel,
        layout=layout,
        micro_batches=parallel.pipeline.micro_batches or max(params.train.accumulation, layout.pipe),
        checkpointing=params.train.activation_checkpointing.mode,
    )
    try:
        subject = Subject(params, precision=precision)
        plan = stage_plan(subject, candidate)
        found = [rank_memory(subject, candidate=candidate, plan=plan, pipe_rank=rank) for rank in range(layout.pipe)]
    except ParamsError:
        return []  # Batches of no fixed shape, say.
    worst = max(found, key=lambda memory: memory.total)
    beside = f"; beside it, in the host's, {gib(worst.host)}" if worst.host else ""
    return [
        f"  memory of a rank, estimated, at most {gib(worst.total)}: weights {gib(worst.parameters)}, gradients "
        f"{gib(worst.gradients)}, optimizer {gib(worst.optimizer)}, activations {gib(worst.activations)}{beside}"
    ]
