"""The checks that every op makes of its tensors, and the one sentence in which each of them fails."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaseq.base.errors import MegaseqError


class KernelError(MegaseqError):
    """An op was called with tensors or settings that it cannot take."""


def fail(argument: str, *, op: str, expected: str, came: object, remedy: str) -> KernelError:
    """The error for one argument of an op: which, what was expected, what came, what to do."""
    return KernelError(f"{op}: {argument} must {expected}, but is {came}. {remedy}.")


def check_shape(
    tensor: torch.Tensor, *, op: str, argument: str, shape: Sequence[int | tuple[int, ...] | None], legend: str
) -> None:
    """Checks the shape of `tensor`.

    Args:
        tensor: what came.
        op: the op's name.
        argument: the argument's name.
        shape: for each dimension its size, a tuple of allowed sizes, or None for any.
        legend: the dimensions' names, such as "[B, T, N, H]", or "of x" for the shape of another tensor.

    Raises:
        KernelError: if the number of dimensions or a size differs.
    """
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        want is None or (any(size == each for each in want) if isinstance(want, tuple) else size == want)
        for size, want in zip(sizes, shape, strict=True)
    )
    if fits:
        return
    wanted = ", ".join(
        "any" if want is None else "|".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in shape
    )
    raise fail(
        argument,
        op=op,
        expected=f"have {'the ' * legend.startswith('of ')}shape {legend} = [{wanted}]",
        came=list(sizes),
        remedy=f"Reshape {argument} or the tensors it belongs to",
    )


def check_like(tensor: torch.Tensor, *, op: str, argument: str, other: torch.Tensor, other_name: str) -> None:
    """Checks that `tensor` has the dtype and the device of `other`.

    Raises:
        KernelError: if either differs.
    """
    if tensor.dtype is not other.dtype:
        raise fail(
            argument,
            op=op,
            expected=f"have the dtype of {other_name}, {other.dtype}",
            came=tensor.dtype,
            remedy=f"Cast {argument} before the call",
        )
    check_device(tensor, op=op, argument=argument, other=other, other_name=other_name)


def check_device(tensor: torch.Tensor, *, op: str, argument: str, other: torch.Tensor, other_name: str) -> None:
    """Checks that `tensor` is on the device of `other`.

    Raises:
        KernelError: if it is elsewhere.
    """
    if tensor.device != other.device:
        raise fail(
            argument,
            op=op,
            expected=f"be on the device of {other_name}, {other.device}",
            came=tensor.device,
            remedy=f"Move {argument} before the call",
        )


def check_floating(tensor: torch.Tensor, *, op: str, argument: str) -> None:
    """Checks that `tensor` holds floating-point numbers.

    Raises:
        KernelError: if it holds something else.
    """
    if not tensor.dtype.is_floating_point:
        raise fail(
            argument, op=op, expected="be floating point", came=tensor.dtype, remedy=f"Cast {argument} before the call"
        )


def check_rate(rate: float, *, op: str) -> None:
    """Checks that a dropout rate lies in [0, 1).

    Raises:
        KernelError: if it does not.
    """
    if not 0.0 <= rate < 1.0:
        raise fail("rate", op=op, expected="be at least 0 and below 1", came=rate, remedy="Set it to 0 for none")
