"""Where a model computes."""

from __future__ import annotations

import torch

from megaseq.base import NestedMap
from megaseq.base.errors import must


def resolve_device(asked: str) -> torch.device:
    """Returns the device that `train.device` means: `auto` is the GPU where torch sees one, else the CPU.

    Raises:
        ParamsError: a GPU is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise must(
            "train.device",
            "be a device of this machine",
            asked,
            "torch sees no GPU: use auto or cpu, or install a driver and a build of torch that fit",
        )
    return torch.device("cuda" if available and asked != "cpu" else "cpu")


def num_devices(asked: str) -> int:
    """Returns the GPUs that processes of a run may take, one each, on this machine; 0 where it computes on the CPU."""
    return 0 if asked == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()


def device_name(device: torch.device) -> str:
    """Returns `cpu`, or the name of the GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def move(batch: NestedMap, *, device: torch.device) -> NestedMap:
    """Returns `batch` with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    return batch.transform(lambda value: value.to(device, non_blocking=True))
