"""Number formats of a training step: which one `auto` means, and fp32 masters behind bf16 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from megaseq.layers.norm import Norm

Precision = Literal["fp32", "bf16", "bf16_autocast"]


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; where it does not, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in probes if hasattr(torch.cpu, name))


def resolve_precision(asked: str, *, device: torch.device) -> Precision:
    """Returns the format of a step: `auto` is bf16 where `device` has it natively, else fp32."""
    if asked == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    if asked not in ("fp32", "bf16", "bf16_autocast"):
        raise ValueError(f"precision: must be auto, fp32, bf16 or bf16_autocast, but is {asked!r}.")
    return asked  # type: ignore[return-value]


def low_precision_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that may be kept in bf16: all but those of norms.

    A norm's scale lies near 1, where 8 bits resolve no step of training, and costs no time in fp32.
    """
    norms = {name for name, child in module.named_modules() if isinstance(child, Norm)}
    return {name: value for name, value in module.named_parameters() if name.rpartition(".")[0] not in norms}


def lower_precision(module: nn.Module) -> None:
    """Rounds the weights of `module` to bf16 in place, those of norms excepted; for decoding."""
    for parameter in low_precision_parameters(module).values():
        parameter.data = parameter.data.to(torch.bfloat16)


class MasterWeights:
    """fp32 copies that the learner updates, and the compute weights of the module that follow them.

    In fp32 and under autocast the two are the same tensors and nothing is copied.
    """

    def __init__(self, module: nn.Module, *, precision: Precision) -> None:
        self._compute = dict(module.named_parameters())
        self.masters: dict[str, torch.Tensor] = dict(self._compute)
        """What the learner owns, by parameter name."""
        self._low: list[torch.Tensor] = []
        self._high: list[torch.Tensor] = []
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if precision != "bf16":
            return
        for name, parameter in low_precision_parameters(module).items():
            master = parameter.detach().clone()
            master.requires_grad_(parameter.requires_grad)
            self.masters[name] = master
            parameter.data = parameter.data.to(torch.bfloat16)
            self._low.append(parameter)
            self._high.append(master)
            self._pairs[name] = (parameter, master)

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the compute weights; to be called after every change of a master."""
        if self._low:
            torch._foreach_copy_(self._low, self._high)

    @torch.no_grad()
    def collect_gradients(self, *, first: bool, names: Iterable[str] | None = None) -> None:
        """Moves the compute weights' gradients to the masters, adding in fp32 unless `first`.

        Sums over micro-batches in bf16 would lose the small ones.

        Args:
            first: whether what the masters have is of an earlier step.
            names: of the parameters; None: all.
        """
        lows, highs = [], []
        pairs = self._pairs.values() if names is None else [self._pairs[name] for name in names if name in self._pairs]
        for parameter, master in pairs:
            if parameter.grad is None:
                continue
            if first or master.grad is None:
                master.grad = parameter.grad.float()
            else:
                lows.append(parameter.grad)
                highs.append(master.grad)
            parameter.grad = None
        if highs:
            torch._foreach_add_(highs, [low.float() for low in lows])

    def clear_gradients(self) -> None:
        """Forgets all gradients, of masters and of compute weights."""
        for tensor in (*self.masters.values(), *self._low):
            tensor.grad = None


def autocast(precision: Precision, *, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the context in which a forward pass runs."""
    if precision == "bf16_autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
