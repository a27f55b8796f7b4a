"""First values that go straight into the shares of ZeRO stage 3: one parameter at a time is whole, on any rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaseq.parallel.mpu import ModelParallelUnit

Values = Callable[[str, Tensor], Tensor]
"""Returns the first values, fp32 on the CPU, of a parameter by its logical name: the same on ranks that share it."""


@dataclass(frozen=True)
class ExactRun:
    """fp32 values of consecutive elements of a flattened parameter that is rounded elsewhere."""

    values: Tensor
    """[N]"""
    first: int = 0
    """Element of the parameter that the first one is."""

    def run(self, first: int, length: int) -> Tensor:
        """Returns [length] values from element `first` of the parameter on."""
        return self.values.narrow(0, first - self.first, length)


class FirstShares:
    """Fills parameters that have no memory yet, each just before DeepSpeed divides it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, values: Values, device: torch.device) -> None:
        """Takes what is to be filled.

        Args:
            parameters: by logical name, of the type that the module computes with.
            values: called once for each.
            device: where parameters are whole between their division and their use.
        """
        self._parameters = dict(parameters)
        self._values = values
        self._device = device
        self.exact: dict[str, ExactRun] = {}
        """This rank's part of the values that were rounded, by name; whole where all ranks keep the parameter whole."""

    def divide(self, deepspeed: ModuleType, *, config: dict[str, Any], unit: ModelParallelUnit) -> None:
        """Fills and divides all parameters; to be called by all ranks before `deepspeed.initialize`."""
        divided: Any = None
        for name, parameter in self._parameters.items():
            values = self._values(name, parameter)
            parameter.data = values.to(device=self._device, dtype=parameter.dtype)
            if divided is None:
                deepspeed.zero.Init(
                    module=nn.ParameterList([parameter]),
                    data_parallel_group=unit.get_data_parallel_group(),
                    config_dict_or_path=config,
                    dtype=parameter.dtype,
                    mpu=unit,
                )
                divided = parameter
            else:
                divided.convert_to_zero_parameters(param_list=[parameter])
            if parameter.dtype != values.dtype:
                self.exact[name] = _own_run(parameter, values=values.flatten())


def _own_run(parameter: Any, *, values: Tensor) -> ExactRun:
    """Returns this rank's part of a parameter's values."""
    size = int(parameter.partition_numel())
    first = min(dist.get_rank(parameter.ds_process_group) * size, values.numel())
    return ExactRun(values[first : first + size].clone(), first=first)
