"""Rotary positions (Su et al. 2021): pairs of elements of each head are turned by an angle of their token."""

from __future__ import annotations

from torch import Tensor

from megaseq.kernels.checks import check_device, check_floating, check_shape, fail
from megaseq.kernels.dispatch import choose, log_once, undirected
from megaseq.kernels.rotary.op import triton_rotate
from megaseq.kernels.rotary.reference import reference_rotate
from megaseq.kernels.rows import unfit

__all__ = ["rotate"]

_OP = "rotary"


def rotate(x: Tensor, *, cosines: Tensor, sines: Tensor, interleaved: bool = False) -> Tensor:
    """Turns pairs of elements at the start of each head; what follows them carries no position.

    The kernel keeps cosines and sines as precise as they come; the reference rounds them to the dtype of `x`.

    Args:
        x: [B, T, N, H].
        cosines: [B or 1, T, 1, R], the same for both of a pair, R even and at most H; no gradient flows to them.
        sines: as the cosines.
        interleaved: pairs are neighbours (2i, 2i + 1), as in GPT-J; else (i, i + R/2), as in GPT-NeoX and Llama.

    Returns:
        [B, T, N, H].

    Raises:
        KernelError: for tensors that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that cannot run
            this call.
    """
    if x.is_cpu and undirected() and _fits(x, cosines=cosines, sines=sines):
        log_once(_OP, "reference")
        return reference_rotate(x, cosines=cosines, sines=sines, interleaved=interleaved)
    _check(x, cosines=cosines, sines=sines)
    reason = unfit(x, cosines, sines)
    automatic = "triton" if x.device.type == "cuda" and reason is None else "reference"
    chosen = choose(_OP, automatic=automatic, impossible={} if reason is None else {"triton": reason})
    if chosen == "triton":
        result: Tensor = triton_rotate(x, cosines, sines, interleaved, False)
        return result
    return reference_rotate(x, cosines=cosines, sines=sines, interleaved=interleaved)


def _fits(x: Tensor, *, cosines: Tensor, sines: Tensor) -> bool:
    """Whether `_check` passes, in a tenth of its time: small tensors in decoding take no longer than that."""
    shape, angles = x.shape, cosines.shape
    if not (len(shape) == len(angles) == 4 and angles == sines.shape and angles[1] == shape[1] and angles[2] == 1):
        return False
    if angles[0] not in (1, shape[0]) or angles[3] % 2 or not 0 < angles[3] <= shape[3]:
        return False
    return (
        cosines.is_cpu
        and sines.is_cpu
        and x.is_floating_point()
        and cosines.is_floating_point()
        and sines.is_floating_point()
    )


def _check(x: Tensor, *, cosines: Tensor, sines: Tensor) -> None:
    """Checks all tensors.

    Raises:
        KernelError: at the first one that does not fit.
    """
    check_floating(x, op=_OP, argument="x")
    check_shape(x, op=_OP, argument="x", shape=(None, None, None, None), legend="[B, T, N, H]")
    width = cosines.shape[-1] if cosines.dim() else 0
    if width % 2 or not 0 < width <= x.shape[-1]:
        raise fail(
            "cosines",
            op=_OP,
            expected=f"have an even width R from 2 to H = {x.shape[-1]}",
            came=width,
            remedy="Turn whole pairs of a head",
        )
    shape = ((1, x.shape[0]), x.shape[1], 1, width)
    for name, angles in (("cosines", cosines), ("sines", sines)):
        check_floating(angles, op=_OP, argument=name)
        check_shape(angles, op=_OP, argument=name, shape=shape, legend="[B or 1, T, 1, R]")
        check_device(angles, op=_OP, argument=name, other=x, other_name="x")
