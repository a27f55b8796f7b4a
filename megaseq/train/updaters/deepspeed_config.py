"""DeepSpeed's JSON, derived from params and never written by hand."""

from __future__ import annotations

from typing import Any

from megaseq.parallel.layout import Parallel
from megaseq.parallel.zero_params import Zero

SUB_GROUP_ELEMENTS = 1_000_000_000
"""Stage 3: elements that are updated together."""


def deepspeed_config(parallel: Parallel.Params) -> dict[str, Any]:
    """Returns what `deepspeed.initialize` is given for stages 1 to 3.

    DeepSpeed shares out and reduces. Clipping, skipping, the schedule and the optimizer are the learner's,
    micro-batches and precision the engine's, so none of them is here: weights in bf16 are lowered before DeepSpeed sees
    them, and gradients are accumulated and sent in fp32.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(parallel.zero),
    }


def _zero(zero: Zero.Params) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.bucket_elements,
        "allgather_bucket_size": zero.bucket_elements + zero.bucket_elements % 2,
        "overlap_comm": bool(zero.overlap),
        "contiguous_gradients": True,
    }
    if zero.offload_optimizer != "none":
        # What lies on a disk is put there by us: DeepSpeed's own way needs an operator that it must compile.
        config["offload_optimizer"] = _offload("cpu", path="")
    if zero.stage == 3:
        config |= {
            "sub_group_size": SUB_GROUP_ELEMENTS,
            "stage3_param_persistence_threshold": zero.persistence_elements,
            "stage3_prefetch_bucket_size": zero.prefetch_elements,
        }
        if zero.offload_parameters != "none":
            config["offload_param"] = _offload(zero.offload_parameters, path=zero.nvme_path)
    return config


def _offload(device: str, *, path: str) -> dict[str, Any]:
    offload: dict[str, Any] = {"device": device, "pin_memory": True}
    if device == "nvme":
        offload["nvme_path"] = path
    return offload
