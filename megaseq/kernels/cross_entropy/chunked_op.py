"""The cross entropy by chunks as an operator of torch, for graphs: one name, with its gradients made as it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.cross_entropy.chunked import compute_dtype, sums_of
from megaseq.kernels.cross_entropy.operator import call, gradients, remember, settings_of
from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums


def as_operator(
    hidden: Tensor, *, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, settings: CrossEntropy
) -> LossSums:
    """`chunked_cross_entropy` of a whole vocabulary as one operator."""
    return call(
        chunked_cross_entropy_op,
        hidden.to(compute_dtype(hidden)),
        weight=weight,
        bias=bias,
        labels=labels,
        weights=weights,
        settings=settings,
    )


@torch.library.custom_op("megaseq::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    numbers: list[float],
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [5] and the gradients of hidden states, weight and bias, empty where not `wanted`; in at least float32.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V].
        labels: int64 [N].
        weights: [N].
        numbers: label_smoothing, z_loss, scale, soft_cap (0: none) of `CrossEntropy`.
        chunk: tokens of a chunk; 0: chosen here.
        wanted: for hidden, weight, bias.
    """
    sums, places = sums_of(
        hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        weights=weights,
        settings=settings_of(numbers, chunk),
        vocabulary=None,
        wanted=(wanted[0], wanted[1], wanted[2]),
    )
    of_hidden = sums.hidden
    if of_hidden is not None and places is not None:
        of_hidden = of_hidden.new_zeros(hidden.shape).index_copy_(0, places, of_hidden)
    nothing = (sums.scalars.new_empty(0) if each is None else each for each in (of_hidden, sums.weight, sums.bias))
    of_hidden, of_weight, of_bias = nothing
    return sums.scalars, of_hidden, of_weight, of_bias


@chunked_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    numbers: list[float],
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1] if bias is None else bias.shape)
    has = (wanted[0], wanted[1], wanted[2] and bias is not None)
    made = (
        hidden.new_empty(shape if is_there else 0, dtype=precise) for shape, is_there in zip(shapes, has, strict=True)
    )
    return (hidden.new_empty(5, dtype=precise), *made)


chunked_cross_entropy_op.register_autograd(gradients, setup_context=remember)
