"""Pipeline parallelism: a model's units become stages of about equal cost, and a schedule drives these.

`runner.PipelineRunner` runs them; it is not imported here, because torch's schedules take as long to import as torch.
"""

from __future__ import annotations

from megaseq.parallel.pipeline.cut import keep_tensors
from megaseq.parallel.pipeline.decoding import PipelinedDecoder
from megaseq.parallel.pipeline.job import PipelineJob
from megaseq.parallel.pipeline.partition import balance
from megaseq.parallel.pipeline.plan import Stage, StagePlan, make_plan
from megaseq.parallel.pipeline.tied import TiedTensors

__all__ = [
    "PipelineJob",
    "PipelinedDecoder",
    "Stage",
    "StagePlan",
    "TiedTensors",
    "balance",
    "keep_tensors",
    "make_plan",
]
