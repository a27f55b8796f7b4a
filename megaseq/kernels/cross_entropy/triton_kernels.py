"""Softmax and loss of rows of logits as Triton kernels, which leave the logits' gradient where the logits were.

A program has one row: it walks over it once for the normaliser and once more, while it is in the second-level cache,
for the gradient. With p the softmax, e the smoothing, w a token's weight, y its label:

    d loss / d logits = w * ((1 + 2 * z_loss * lse) * p - (1 - e) * onehot(y) - e / V) * (1 - (logits / cap)^2)
"""

from __future__ import annotations

from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.cross_entropy.configs import default
from megaseq.kernels.cross_entropy.settings import CrossEntropy
from megaseq.kernels.triton_math import tanh
from megaseq.kernels.triton_runtime import tl, triton

PARTS = 4
"""Numbers that the kernels write for each row."""


@triton.jit
def _capped(logits, soft_cap, HAS_CAP: tl.constexpr):
    """Logits in float32, capped."""
    x = logits.to(tl.float32)
    if HAS_CAP:
        x = soft_cap * tanh(x / soft_cap)
    return x


@triton.jit
def _walk(ROW, num_classes, soft_cap, HAS_CAP: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr):
    """The highest logit of a row, the sum of exp(logit - highest) and the sum of the logits."""
    top = -float("inf")
    total = 0.0
    logit_sum = 0.0
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_classes
        x = _capped(tl.load(ROW + column, mask=inside, other=0.0), soft_cap, HAS_CAP)
        if HAS_SUM:
            logit_sum += tl.sum(tl.where(inside, x, 0.0), 0)
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        # Classes may be forbidden by a logit of -inf, even all of a block.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    return top, total, logit_sum


@triton.jit
def _replace(
    ROW,
    num_classes,
    label,
    weight,
    lse,
    smoothing,
    share,
    z_loss,
    soft_cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites a row of logits by their gradient; a label outside the row has no element in it."""
    factor = weight * (1.0 + 2.0 * z_loss * lse)
    on_label = weight * (1.0 - smoothing)
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_classes
        logits = tl.load(ROW + column, mask=inside, other=0.0)
        x = _capped(logits, soft_cap, HAS_CAP)
        gradient = factor * tl.exp(x - lse) - weight * share
        gradient = tl.where(column == label, gradient - on_label, gradient)
        if HAS_CAP:
            capped = x / soft_cap
            gradient = gradient * (1.0 - capped * capped)
        tl.store(ROW + column, gradient.to(logits.dtype), mask=inside)


@triton.jit
def cross_entropy_kernel(
    LOGITS,
    LABELS,
    WEIGHTS,
    PARTS_OUT,
    num_classes,
    stride,
    parts_stride,
    smoothing,
    share,
    z_loss,
    soft_cap,
    HAS_CAP: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All classes of one row: its weighted loss, nll, correctness and z-loss, and the gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + row * stride
    label = tl.load(LABELS + row)
    weight = tl.load(WEIGHTS + row).to(tl.float32)
    # Read before the walk, whose reductions all warps wait for: no warp overwrites it before another has read it.
    of_label = _capped(tl.load(ROW + label), soft_cap, HAS_CAP)
    top, total, logit_sum = _walk(ROW, num_classes, soft_cap, HAS_CAP, HAS_SUM, BLOCK)
    lse = top + tl.log(total)
    nll = lse - of_label
    loss = nll
    if HAS_SUM:
        loss = (1.0 - smoothing) * nll + (smoothing * lse - share * logit_sum)
    squared = z_loss * lse * lse
    OUT = PARTS_OUT + row
    # The label of a token without weight is made up, and may be a forbidden class.
    tl.store(OUT, tl.where(weight == 0.0, 0.0, weight * (loss + squared)))
    tl.store(OUT + parts_stride, tl.where(weight == 0.0, 0.0, weight * nll))
    tl.store(OUT + 2 * parts_stride, tl.where(of_label >= top, weight, 0.0))
    tl.store(OUT + 3 * parts_stride, tl.where(weight == 0.0, 0.0, weight * squared))
    if HAS_GRADIENT:
        _replace(ROW, num_classes, label, weight, lse, smoothing, share, z_loss, soft_cap, HAS_CAP, BLOCK)


@triton.jit
def cross_entropy_part_kernel(
    LOGITS,
    LABELS,
    PARTS_OUT,
    num_classes,
    stride,
    parts_stride,
    first,
    soft_cap,
    HAS_CAP: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some classes of one row: highest logit, sum of exponentials, logit of the label or 0, sum of logits."""
    row = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + row * stride
    label = tl.load(LABELS + row) - first
    here = (label >= 0) & (label < num_classes)
    # Any other class stands in for a label that is not here.
    of_label = _capped(tl.load(ROW + tl.where(here, label, 0)), soft_cap, HAS_CAP)
    top, total, logit_sum = _walk(ROW, num_classes, soft_cap, HAS_CAP, HAS_SUM, BLOCK)
    OUT = PARTS_OUT + row
    tl.store(OUT, top)
    tl.store(OUT + parts_stride, total)
    tl.store(OUT + 2 * parts_stride, tl.where(here, of_label, 0.0))
    tl.store(OUT + 3 * parts_stride, logit_sum)


@triton.jit
def cross_entropy_gradient_kernel(
    LOGITS,
    LABELS,
    WEIGHTS,
    LSE,
    num_classes,
    stride,
    first,
    smoothing,
    share,
    z_loss,
    soft_cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some classes of one row, whose normaliser over all classes is known: the gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row) - first
    weight = tl.load(WEIGHTS + row).to(tl.float32)
    lse = tl.load(LSE + row)
    ROW = LOGITS + row * stride
    _replace(ROW, num_classes, label, weight, lse, smoothing, share, z_loss, soft_cap, HAS_CAP, BLOCK)


@triton_runtime.on_its_device
def launch_whole(
    logits: Tensor, *, labels: Tensor, weights: Tensor, parts: Tensor, settings: CrossEntropy, graded: bool
) -> None:
    """Writes loss, nll, correctness and z-loss of each row, all weighted, and the gradient over the logits if wanted.

    Args:
        logits: [n, V] with neighbouring classes.
        labels: int64 [n], contiguous.
        weights: float32 [n], contiguous.
        parts: float32 [4, n], written; the numbers of a kind are neighbours.
        settings: of the loss.
        graded: whether the logits become their gradient.
    """
    count, num_classes = logits.shape
    share = settings.label_smoothing / num_classes
    cross_entropy_kernel[(count,)](
        logits,
        labels,
        weights,
        parts,
        num_classes,
        logits.stride(0),
        parts.stride(0),
        settings.label_smoothing,
        share,
        settings.z_loss,
        settings.soft_cap or 1.0,
        HAS_CAP=settings.soft_cap is not None,
        HAS_SUM=settings.label_smoothing > 0,
        HAS_GRADIENT=graded,
        **_arguments("cross_entropy", logits),
    )


@triton_runtime.on_its_device
def launch_part(logits: Tensor, *, labels: Tensor, parts: Tensor, first: int, settings: CrossEntropy) -> None:
    """Writes what is known of each row from the classes `first` and following.

    Args:
        logits: [n, part of V] with neighbouring classes.
        labels: int64 [n], contiguous, numbers among all classes.
        parts: float32 [4, n], written: highest logit, sum of exp(logit - highest), logit of the label or 0, sum of
            logits.
        first: first class that is here.
        settings: of the loss.
    """
    count, num_classes = logits.shape
    cross_entropy_part_kernel[(count,)](
        logits,
        labels,
        parts,
        num_classes,
        logits.stride(0),
        parts.stride(0),
        first,
        settings.soft_cap or 1.0,
        HAS_CAP=settings.soft_cap is not None,
        HAS_SUM=settings.label_smoothing > 0,
        **_arguments("cross_entropy_part", logits),
    )


@triton_runtime.on_its_device
def launch_gradient(
    logits: Tensor, *, labels: Tensor, weights: Tensor, lse: Tensor, first: int, share: float, settings: CrossEntropy
) -> None:
    """Overwrites logits by their gradient.

    Args:
        logits: [n, part of V] with neighbouring classes.
        labels: int64 [n], contiguous, numbers among all classes.
        weights: float32 [n], contiguous.
        lse: float32 [n], contiguous: the normaliser over all classes.
        first: first class that is here.
        share: what the smoothed target gives every class.
        settings: of the loss.
    """
    count, num_classes = logits.shape
    cross_entropy_gradient_kernel[(count,)](
        logits,
        labels,
        weights,
        lse,
        num_classes,
        logits.stride(0),
        first,
        settings.label_smoothing,
        share,
        settings.z_loss,
        settings.soft_cap or 1.0,
        HAS_CAP=settings.soft_cap is not None,
        **_arguments("cross_entropy_gradient", logits),
    )


def _arguments(kernel: str, logits: Tensor) -> dict[str, int]:
    num_classes = logits.shape[1]
    key = f"{triton_runtime.kind_of(logits.dtype)},V={triton.next_power_of_2(num_classes)}"
    return triton_runtime.config(kernel, key=key, default=default(num_classes)).arguments()
