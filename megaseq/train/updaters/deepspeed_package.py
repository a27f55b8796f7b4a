"""The one place that imports DeepSpeed, and what must be set before it is used."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megaseq.base import optional
from megaseq.base.errors import must
from megaseq.parallel.layout import Layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.mpu import ModelParallelUnit
from megaseq.train.updaters.first_shares import FirstShares


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log says something that a user can act on."""
    return "untested optimizer" not in record.getMessage()


def load_deepspeed(device: torch.device) -> ModuleType:
    """Imports DeepSpeed for a device; it compiles nothing, now or later, and says nothing but warnings.

    Raises:
        MissingPackageError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = optional("deepspeed", needed_for="ZeRO (parallel.zero.stage of 1 to 3)")
    # An all-reduce for inference on CPUs, which would be compiled at the first collective (70 to 150 s).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # Collectives that DeepSpeed calls by names which torch has renamed.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    return deepspeed


def check_nvme(device: torch.device, *, frozen: Sequence[str]) -> None:
    """Refuses parameters on a disk where they cannot be.

    Raises:
        ParamsError: DeepSpeed's operator for it is not there and cannot be built, or there are frozen parameters.
    """
    deepspeed = load_deepspeed(device)
    path, value = "parallel.zero.offload_parameters", "nvme"
    if not deepspeed.ops.__compatible_ops__.get("async_io", False):
        rule = "be none or cpu where DeepSpeed's operator async_io cannot be loaded"
        raise must(path, rule, value, "Install libaio-dev, or set it to cpu")
    if frozen:
        rule = "be none or cpu where parameters are frozen"
        raise must(path, rule, value, "Checkpoints take frozen parameters from memory: set it to cpu")


def start_deepspeed(
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    mesh: Mesh | None,
    device: torch.device,
    first_shares: FirstShares | None = None,
) -> Any:
    """Returns DeepSpeed's engine around `module`; all ranks at the same time.

    Args:
        module: initialised, on `device`, or without values, for `first_shares`.
        optimizer: of its parameters that train.
        config: DeepSpeed's JSON.
        mesh: None is one process, which gets a process group of its own.
        device: of this process.
        first_shares: fills the parameters where they are without memory.
    """
    deepspeed = load_deepspeed(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if mesh is None:
        mesh = Mesh(Layout(), rank=0)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
    unit = ModelParallelUnit(mesh)
    if first_shares is not None:
        first_shares.divide(deepspeed, config=config, unit=unit)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, mpu=unit, dist_init_required=False
    )
    return engine
