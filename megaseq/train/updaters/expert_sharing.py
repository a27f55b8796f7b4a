"""What DeepSpeed must know of experts: ranks along `expert` hold different ones, and the others share each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaseq.learner import ParameterGroup
from megaseq.parallel.gradients import is_expert
from megaseq.parallel.mesh import Mesh
from megaseq.train.updaters.deepspeed_package import load_deepspeed


def mark_experts(parameters: Iterable[Tensor], *, mesh: Mesh | None, device: torch.device) -> None:
    """Marks the experts among `parameters`, so that DeepSpeed reduces and shares them among those that hold the same.

    DeepSpeed divides the sums of their gradients by the number of all data ranks, as it does with other parameters.

    Args:
        parameters: of this rank; before DeepSpeed sees them.
        mesh: None is one process.
        device: of this process.
    """
    if mesh is None or mesh.size("expert") == 1:
        return
    same = mesh.group("expert_data", "context")
    if same is None:
        # DeepSpeed wants a group also where a rank is alone.
        same = dist.new_group([mesh.rank], use_local_synchronization=True)
    name = f"ep_size_{mesh.size('expert')}"
    groups = load_deepspeed(device).utils.groups
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = same
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.group("expert")
    experts: list[Any] = [parameter for parameter in parameters if is_expert(parameter)]
    for parameter in experts:
        # What stages 1 and 2 read.
        parameter.allreduce = False
        parameter.group_name = name
        # What stage 3 reads.
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = name
        parameter.ds_zero_partition_process_group = same


def options_of(group: ParameterGroup) -> dict[str, Any]:
    """Returns what DeepSpeed wants in a group of an optimizer that is of experts; nothing in others."""
    name = getattr(group.tensors[0], "group_name", "")
    return {"moe": True, "name": name} if name else {}


def sign_of_experts(device: torch.device) -> nn.Module:
    """Returns a module without parameters in which the engine of stages 1 and 2 sees that a model has experts."""
    # Its import compiles nothing, but it is not part of what `import deepspeed` brings.
    load_deepspeed(device)
    import importlib

    base: Any = importlib.import_module("deepspeed.moe.layer").MoE

    class Sign(base):  # type: ignore[misc]
        """Looks like a layer with experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """The groups are made already."""

    made: nn.Module = Sign()
    return made
