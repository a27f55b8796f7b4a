"""Which implementation runs, and the op as torch sees it: one name under which it is traced, compiled and exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.base import native
from megaseq.kernels import triton_runtime
from megaseq.kernels.beam_step import configs
from megaseq.kernels.beam_step.reference import native_beam_step, reference_beam_step
from megaseq.kernels.beam_step.rule import BeamStep, StepRule
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dispatch import choose


def run(logits: Tensor, *, total: Tensor, rule: StepRule, forbid_eos: Tensor | None, normalised: bool) -> BeamStep:
    """`beam_step` after its checks, by the implementation that is chosen."""
    impossible = {}
    reason = _unable(logits, total=total, rule=rule)
    if reason is not None:
        impossible["triton"] = reason
    reason = _unfit(logits, forbid_eos=forbid_eos, normalised=normalised)
    if reason is not None:
        impossible["native"] = reason
    automatic = "reference"
    if logits.is_cuda and "triton" not in impossible:
        automatic = "triton"
    elif "native" not in impossible:
        automatic = "native"
    chosen = choose("beam_step", automatic=automatic, impossible=impossible)
    if chosen == "native":
        return native_beam_step(logits, total=total, rule=rule)
    if chosen == "triton":
        from megaseq.kernels.beam_step.launch import triton_beam_step

        return triton_beam_step(logits, total=total, rule=rule, forbid_eos=forbid_eos, normalised=normalised)
    return reference_beam_step(logits, total=total, rule=rule, forbid_eos=forbid_eos, normalised=normalised)


def _unable(logits: Tensor, *, total: Tensor, rule: StepRule) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "its kernels take float32, bfloat16 and float16"
    widest = max(total.shape[1], -(-min(rule.count, logits.shape[1]) // 2))
    if widest > configs.MAX_HYPS:
        return f"its kernels take up to {configs.MAX_HYPS} hypotheses and twice as many proposals of each"
    return triton_runtime.unable(logits)


def _unfit(logits: Tensor, *, forbid_eos: Tensor | None, normalised: bool) -> str | None:
    if forbid_eos is not None or normalised:
        return "the extension takes logits that nothing forbids"
    if logits.device.type != "cpu" or logits.dtype is not torch.float32 or logits.numel() == 0:
        return "the extension takes float32 in host memory"
    return None if native.available() else "the compiled extension is not there"


_SCHEMA = (
    "(Tensor logits, Tensor total, Tensor? forbid_eos, SymInt eos_id, SymInt count, SymInt size, "
    "float max_logit_delta, float local_threshold, bool normalised) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("megaseq::beam_step", mutates_args=(), schema=_SCHEMA)
def _beam_step(
    logits: Tensor,
    total: Tensor,
    forbid_eos: Tensor | None,
    eos_id: int,
    count: int,
    size: int,
    max_logit_delta: float,
    local_threshold: float,
    normalised: bool,
) -> tuple[Tensor, ...]:
    rule = StepRule(eos_id, count, size, max_logit_delta, local_threshold)
    step = run(logits, total=total, rule=rule, forbid_eos=forbid_eos, normalised=normalised)
    return tuple(each.contiguous() for each in step)


@_beam_step.register_fake
def _(
    logits: Tensor, total: Tensor, forbid_eos: Tensor | None, eos_id: int, count: int, size: int, *_: Any
) -> tuple[Tensor, ...]:
    count = min(count, logits.shape[1])
    batch, num_hyps = total.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    return (
        new(batch, num_hyps, count),
        new(batch, num_hyps, count, dtype=torch.int64),
        new(batch, num_hyps),
        new(batch, num_hyps, dtype=torch.bool),
        new(batch, size),
        new(batch, size, dtype=torch.int64),
        new(batch, size, dtype=torch.int64),
    )


def _no_gradient(_: Any, *__: Tensor) -> None:
    raise KernelError("beam_step: must not be asked for a gradient, but is. Call it under torch.no_grad().")


_beam_step.register_autograd(_no_gradient)


def traced(logits: Tensor, *, total: Tensor, rule: StepRule, forbid_eos: Tensor | None, normalised: bool) -> BeamStep:
    """`run` as one op of a graph."""
    numbers = (rule.eos_id, rule.count, rule.size, rule.max_logit_delta, rule.local_threshold)
    return BeamStep(*_beam_step(logits, total, forbid_eos, *numbers, normalised))
