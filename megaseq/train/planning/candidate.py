"""One way to run a model on so many devices, as the planner sees it."""

from __future__ import annotations

import dataclasses

from megaseq.parallel.layout import Layout, Parallel
from megaseq.parallel.pipeline_params import stages_per_rank
from megaseq.train.activation_checkpointing import Mode


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout with everything else that decides memory and time."""

    parallel: Parallel.Params
    layout: Layout
    micro_batches: int
    """Of a step, on every rank."""
    checkpointing: Mode = "none"

    @property
    def stages(self) -> int:
        """Pipeline stages of all ranks together."""
        return self.layout.pipe * (stages_per_rank(self.parallel.pipeline) if self.layout.pipe > 1 else 1)

    @property
    def sequence(self) -> bool:
        """Whether tensor ranks share tokens too."""
        return self.parallel.sequence and self.layout.tensor > 1

    @property
    def v_shaped(self) -> bool:
        """Whether each pipe rank has a stage on the way down a V and one on the way up, zero-bubble's schedule."""
        return self.layout.pipe > 1 and self.parallel.pipeline.schedule == "zero_bubble_v"

    @property
    def overlaps(self) -> bool:
        """Whether gradients are summed over data ranks while backward passes go on."""
        overlap = self.parallel.zero.overlap
        if self.parallel.zero.stage == 0:
            return overlap is not False and self.layout.pipe == 1
        return bool(overlap)

    @property
    def offloads(self) -> bool:
        """Whether something lies in the memory of the host, or on its disks."""
        zero = self.parallel.zero
        return zero.offload_optimizer != "none" or zero.offload_parameters != "none"

    def in_device_memory(self) -> Candidate:
        """Returns the same with nothing offloaded."""
        parallel = self.parallel.copy()
        parallel.set("zero.offload_optimizer", "none", origin="the planner")
        parallel.set("zero.offload_parameters", "none", origin="the planner")
        return dataclasses.replace(self, parallel=parallel)

    def alive(self, rank: int) -> tuple[int, ...]:
        """Returns the most micro-batches of which each stage of a pipe rank keeps activations at the same time.

        gpipe keeps all; 1f1b as many as there are ranks from this one on (Narayanan et al. 2019); interleaved further
        ones, for its later stages (Narayanan et al. 2021). Those of the V of zero-bubble are in
        `megaseq.train.planning.halves`.
        """
        p, m = self.layout.pipe, self.micro_batches
        if p == 1:
            return (1,)
        schedule = self.parallel.pipeline.schedule
        if schedule == "gpipe":
            return (m,)
        if schedule == "1f1b":
            return (min(m, p - rank),)
        per_rank = stages_per_rank(self.parallel.pipeline)
        passes = (p - rank - 1) * 2 + (per_rank - 1) * p + 1
        # Forward passes go through as many micro-batches as ranks with one stage, then with the next.
        turns = [(index // p) % per_rank for index in range(passes)]
        return tuple(max(1, min(m, turns.count(stage))) for stage in range(per_rank))

    def bubble(self) -> float:
        """Returns the share of a step in which a rank waits for others of its pipeline, stages of equal cost given."""
        p, m = self.layout.pipe, self.micro_batches
        if p == 1:
            return 0.0
        schedule = self.parallel.pipeline.schedule
        waits = float(p - 1)
        if schedule == "interleaved":
            waits /= stages_per_rank(self.parallel.pipeline)
        elif schedule == "zero_bubble_v":
            # Weight gradients fill the gaps; what is left is the difference between its passes.
            waits /= 6.0
        return waits / (waits + m)

    def overrides(self) -> str:
        """Returns the params that ask for this, as the command line takes them."""
        p = self.parallel
        said = [f"parallel.{axis}={self.layout.size(axis)}" for axis in ("data", "tensor", "pipe", "context", "expert")]
        parts = [text for text in said if not text.endswith("=1")] or ["parallel.data=1"]
        if self.sequence:
            parts.append("parallel.sequence=true")
        if p.zero.stage:
            parts.append(f"parallel.zero.stage={p.zero.stage}")
        if self.layout.pipe > 1:
            parts.append(f"parallel.pipeline.schedule={p.pipeline.schedule}")
            parts.append(f"parallel.pipeline.micro_batches={self.micro_batches}")
        elif self.micro_batches > 1:
            parts.append(f"train.accumulation={self.micro_batches}")
        if self.checkpointing != "none":
            parts.append(f"train.activation_checkpointing.mode={self.checkpointing}")
        return " ".join(parts)
