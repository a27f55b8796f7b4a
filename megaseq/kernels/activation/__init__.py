"""Activations of feed-forward blocks, gated and plain, in one pass over their input and one over their gradient."""

from __future__ import annotations

from torch import Tensor

from megaseq.kernels.activation.op import triton_activation
from megaseq.kernels.activation.reference import FUNCTIONS, reference_activation
from megaseq.kernels.checks import check_floating, fail
from megaseq.kernels.dispatch import choose, log_once, undirected
from megaseq.kernels.rows import unfit

__all__ = ["gated_activation"]

_OP = "activation"


def gated_activation(hidden: Tensor, *, name: str, gated: bool = True) -> Tensor:
    """act(gate) * up of two halves that one projection made (Shazeer 2020), or act of all of it.

    The kernels keep `hidden` alone for the backward pass and compute the activation again; they round once, where
    torch rounds the activation first.

    Args:
        hidden: [..., 2F], gate before up, if gated, else [..., F].
        name: of the activation, a key of `reference.FUNCTIONS`.
        gated: whether the second half is multiplied in.

    Returns:
        [..., F].

    Raises:
        KernelError: for a tensor or a name that does not fit, or an implementation asked for in `MEGASEQ_KERNELS` that
            cannot run this call.
    """
    _check(hidden, name=name, gated=gated)
    if hidden.is_cpu and undirected():
        # Small tensors in decoding take no longer than to look for what else could run.
        log_once(_OP, "reference")
        return reference_activation(hidden, name=name, gated=gated)
    reason = unfit(hidden)
    automatic = "triton" if hidden.device.type == "cuda" and reason is None else "reference"
    chosen = choose(_OP, automatic=automatic, impossible={} if reason is None else {"triton": reason})
    if chosen == "triton":
        result: Tensor = triton_activation(hidden, name, gated)
        return result
    return reference_activation(hidden, name=name, gated=gated)


def _check(hidden: Tensor, *, name: str, gated: bool) -> None:
    """Checks the arguments.

    Raises:
        KernelError: at the first one that does not fit.
    """
    check_floating(hidden, op=_OP, argument="hidden")
    if hidden.dim() == 0 or (gated and hidden.shape[-1] % 2):
        raise fail(
            "hidden",
            op=_OP,
            expected="have shape [..., 2F]" if gated else "have shape [..., F]",
            came=list(hidden.shape),
            remedy="Project to gate and up at once",
        )
    if name not in FUNCTIONS:
        raise fail("name", op=_OP, expected=f"be one of {', '.join(FUNCTIONS)}", came=name, remedy="Use relu")
