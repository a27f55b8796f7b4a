"""Pipeline parallelism: a model's units become stages of about equal cost, and a schedule drives these."""

from megaseq.parallel.pipeline.cut import keep_tensors
from megaseq.parallel.pipeline.decoding import PipelinedDecoder
from megaseq.parallel.pipeline.job import PipelineJob
from megaseq.parallel.pipeline.partition import balance
from megaseq.parallel.pipeline.plan import Stage, StagePlan, make_plan
from megaseq.parallel.pipeline.runner import PipelineRunner
from megaseq.parallel.pipeline.tied import TiedTensors

__all__ = [
    "PipelineJob",
    "PipelineRunner",
    "PipelinedDecoder",
    "Stage",
    "StagePlan",
    "TiedTensors",
    "balance",
    "keep_tensors",
    "make_plan",
]
