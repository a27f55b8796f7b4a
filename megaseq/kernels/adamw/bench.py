"""What `megaseq bench kernels` proves and times of AdamW: the flat parameters of a rank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megaseq.kernels.adamw import AdamWSettings, adamw_, apex
from megaseq.kernels.adamw.configs import configs
from megaseq.kernels.adamw.reference import reference_adamw_
from megaseq.kernels.bench.passes import normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed

SETTINGS = AdamWSettings(1e-3, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A run of parameters."""

    name: str
    count: int
    gradients: torch.dtype = torch.float32
    copied: bool = False
    """Whether a bf16 copy is written."""

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Parameters, gradients and both moments [n], the number of the step, and where asked for the copy."""
        make = functools.partial(normal, self.count, device=device, trained=False)
        state = {
            "parameters": make(dtype=torch.float32),
            "gradients": make(dtype=torch.float32, seed=1).to(self.gradients),
            "first": make(dtype=torch.float32, seed=2) * 0.1,
            "second": make(dtype=torch.float32, seed=3).square() * 0.1,
            "step": torch.tensor(3.0, device=device),
        }
        if self.copied:
            state["copy"] = state["parameters"].bfloat16()
        return state

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        return dataclasses.replace(self, count=1_000_000 if on_gpu else 2500)


SHAPES = (
    Shape("fp32_200m", 200_000_000),
    Shape("bf16_gradients_and_copy_200m", 200_000_000, gradients=torch.bfloat16, copied=True),
    Shape("fp32_10m", 10_000_000),
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "adamw",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={"adamw": configs()},
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """All that is written beside what the reference writes."""
    shape = shape.small(on_gpu=device.type == "cuda")
    ours, theirs = shape.state(device), shape.state(device)
    _ours(ours)
    reference_adamw_(
        theirs["parameters"],
        gradients=theirs["gradients"],
        moments=(theirs["first"], theirs["second"]),
        settings=SETTINGS,
        step=theirs["step"],
        divisor=None,
        skip=None,
        copy=theirs.get("copy"),
    )
    tolerance = {"copy": 1e-2}
    return {name: Comparison(ours[name], theirs[name], tolerance.get(name, 1e-6)) for name in ours}


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Parameters of full number; on the host a few."""
    shape = shape if device.type == "cuda" else shape.small()
    state = shape.state(device)
    peers: dict[str, Callable[[], Callable[[], object]]] = {}
    if shape.gradients is torch.float32:
        peers["torch_fused"] = lambda: functools.partial(_torch, shape.state(device))
        if device.type == "cuda" and apex.missing() is None:
            peers["apex"] = lambda: functools.partial(_apex, shape.state(device))
    # Parameters and moments are read and written.
    moved = shape.count * (3 * 8 + state["gradients"].element_size() + 2 * shape.copied)
    goals = {"ceiling": 0.85, **({"torch_fused": 1.0} if peers else {})}
    return Timed(functools.partial(_ours, state), peers=peers, bytes=moved, goals=goals)


def _ours(state: dict[str, Tensor]) -> list[Tensor]:
    adamw_(
        state["parameters"],
        gradients=state["gradients"],
        moments=(state["first"], state["second"]),
        settings=SETTINGS,
        step=state["step"],
        copy=state.get("copy"),
    )
    return [state["parameters"], state["first"], state["second"]]


def _torch(state: dict[str, Tensor]) -> list[Tensor]:
    torch._fused_adamw_(
        [state["parameters"]],
        [state["gradients"]],
        [state["first"]],
        [state["second"]],
        [],
        [state["step"]],
        lr=SETTINGS.learning_rate,
        beta1=SETTINGS.beta1,
        beta2=SETTINGS.beta2,
        weight_decay=0.01,
        eps=SETTINGS.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )
    return [state["parameters"], state["first"], state["second"]]


def _apex(state: dict[str, Tensor]) -> list[Tensor]:
    apex.apex_adamw_(
        [state["parameters"]],
        gradients=[state["gradients"]],
        moments=([state["first"]], [state["second"]]),
        settings=SETTINGS,
        step=state["step"],
        divisor=None,
        skip=None,
    )
    return [state["parameters"], state["first"], state["second"]]
