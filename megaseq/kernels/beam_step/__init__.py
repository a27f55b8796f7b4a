"""A step of beam search: from logits to the best extensions of every source. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.beam_step.op import run, traced
from megaseq.kernels.beam_step.rule import BeamStep, StepRule
from megaseq.kernels.checks import KernelError, check_device, check_floating, check_shape, fail

__all__ = ["BeamStep", "StepRule", "beam_step"]

_OP = "beam_step"


def beam_step(
    logits: Tensor, *, total: Tensor, rule: StepRule, forbid_eos: Tensor | None = None, normalised: bool = False
) -> BeamStep:
    """Takes each hypothesis' best tokens, and of those each source's best that go on.

    On a GPU the logits are read once and their log-probabilities never written.

    Among the tokens of one hypothesis, equal log-probabilities in fp32 fall to the lower id. Among the extensions of a
    source, equal scores fall to the lower token, then to the lower hypothesis. Nothing is read back from the device.

    Args:
        logits: [B * K, V], the hypotheses of one source next to each other. A row of -inf proposes nothing; NaN or +inf
            in a row makes its scores NaN, which the caller has to look for.
        total: fp32 [B, K], log-probability of each hypothesis so far; -inf where there is none.
        rule: how many are wanted, and when the end token is allowed.
        forbid_eos: bool [B], sources whose hypotheses may not end here: there the end token's log-probability is -inf,
            those of the others stay.
        normalised: `logits` are log-probabilities, taken as they are.

    Returns:
        The extensions; see `BeamStep`.

    Raises:
        KernelError: for tensors that do not fit each other, a wanted gradient, or an implementation asked for in
            `MEGASEQ_KERNELS` that cannot run this call.
    """
    check_floating(logits, op=_OP, argument="logits")
    check_shape(total, op=_OP, argument="total", shape=(None, None), legend="[B, K]")
    batch, num_hyps = total.shape
    check_shape(logits, op=_OP, argument="logits", shape=(batch * num_hyps, None), legend="[B * K, V]")
    if total.dtype is not torch.float32:
        raise fail("total", op=_OP, expected="be float32", came=total.dtype, remedy="Cast it before the call")
    check_device(total, op=_OP, argument="total", other=logits, other_name="logits")
    if forbid_eos is not None:
        check_shape(forbid_eos, op=_OP, argument="forbid_eos", shape=(batch,), legend="[B]")
        check_device(forbid_eos, op=_OP, argument="forbid_eos", other=logits, other_name="logits")
        if forbid_eos.dtype is not torch.bool:
            raise fail("forbid_eos", op=_OP, expected="be bool", came=forbid_eos.dtype, remedy="Compare it with 0")
    if not 0 <= rule.eos_id < logits.shape[1]:
        raise fail(
            "rule.eos_id", op=_OP, expected=f"be a token of the {logits.shape[1]} there are", came=rule.eos_id,
            remedy="Set the model's own end-of-sequence id",
        )  # fmt: skip
    if min(rule.count, rule.size, num_hyps) < 1:
        came = (rule.count, rule.size, num_hyps)
        raise fail("rule", op=_OP, expected="have count, size and K of 1 or more", came=came, remedy="Raise them")
    if torch.is_grad_enabled() and (logits.requires_grad or total.requires_grad):
        raise KernelError(f"{_OP}: must not be asked for a gradient, but is. Call it under torch.no_grad().")
    # Where nothing is traced, the way through torch's dispatcher would only cost time.
    implementation = traced if torch.compiler.is_compiling() else run
    return implementation(logits, total=total, rule=rule, forbid_eos=forbid_eos, normalised=normalised)
