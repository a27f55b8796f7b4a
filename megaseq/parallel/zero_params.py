"""Params of ZeRO: what data-parallel ranks share of gradients, optimizer state and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megaseq.base import Configurable, Problem


class Zero(Configurable):
    """ZeRO (Rajbhandari et al. 2020), by DeepSpeed's engine from stage 1 on; only its params are used."""

    class Params(Configurable.Params):
        stage: Literal[0, 1, 2, 3] = 0
        """0: every rank holds everything; 1: shares of master weights and moments; 2: of gradients too; 3: of
        parameters too."""
        offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
        """Where shares of master weights and moments lie between steps."""
        offload_parameters: Literal["none", "cpu", "nvme"] = "none"
        """Where shares of parameters lie between uses; stage 3 only."""
        nvme_path: str = ""
        """Directory on a local disk, for `nvme`."""
        bucket_elements: int = 50_000_000
        """Gradients that are reduced together, in elements; stage 0 with overlap makes at least about eight buckets."""
        overlap: bool | None = None
        """Whether gradients are reduced, bucket by bucket, while the backward pass goes on; null: in stage 0, where it
        costs nothing."""
        persistence_elements: int = 100_000
        """Stage 3: smaller parameters are kept whole."""
        prefetch_elements: int = 50_000_000
        """Stage 3: elements gathered ahead of their use."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports offloading that the stage cannot do."""
            yield from super().validate()
            if self.offload_optimizer != "none" and self.stage < 1:
                yield (
                    f"offload_optimizer: must be none below stage 1, but is {self.offload_optimizer!r}. "
                    "Set parallel.zero.stage=1, or parallel.zero.offload_optimizer=none."
                )
            if self.offload_parameters != "none" and self.stage < 3:
                yield (
                    f"offload_parameters: must be none below stage 3, but is {self.offload_parameters!r}. "
                    "Set parallel.zero.stage=3, or parallel.zero.offload_parameters=none."
                )
            if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
                yield (
                    "nvme_path: must name a directory for nvme, but is empty. Set it to one on a local disk, or "
                    "offload to cpu."
                )

    params: Params
