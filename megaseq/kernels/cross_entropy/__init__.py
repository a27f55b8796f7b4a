"""Projection to the vocabulary and cross entropy in one op, so that the logits of all tokens need not exist at once."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.checks import check_device, check_floating, check_like, check_shape, fail
from megaseq.kernels.cross_entropy.chunked import chunked_cross_entropy
from megaseq.kernels.cross_entropy.fused import fused_cross_entropy
from megaseq.kernels.cross_entropy.reference import reference_cross_entropy
from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums, VocabularyShare
from megaseq.kernels.dispatch import choose
from megaseq.kernels.functions import autocast_on
from megaseq.kernels.rows import unfit

__all__ = ["CrossEntropy", "LossSums", "VocabularyShare", "linear_cross_entropy"]

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    settings: CrossEntropy | None = None,
    vocabulary: VocabularyShare | None = None,
) -> LossSums:
    """Cross entropy of `softmax(hidden @ weight.T + bias)` against labels, summed over tokens.

    Tokens of weight 0 (padding) cost nothing. The softmax is in fp32; the gradient of `weight` is summed in fp32.

    Args:
        hidden: [N, D].
        weight: [V, D], such as the target embedding.
        labels: integers [N]; those of tokens with weight 0 are not read.
        weights: [N], how much each token counts; no gradient flows to it.
        bias: [V].
        settings: smoothing, z-loss, scale, soft cap, chunk; None: plain cross entropy.
        vocabulary: where ranks share it, what is here: `weight` and `bias` are then a part of the rows, and `hidden`
            and `labels` are the same on all ranks. The sums are those of the whole; the gradient of `hidden` is this
            rank's part, which the caller sums over ranks.

    Returns:
        Sums, of which only `loss` has a gradient. Divide by the weight of the whole step, not of this call.

    Raises:
        KernelError: for shapes, dtypes, devices or labels that do not fit, or if `MEGASEQ_KERNELS` asks for an
            implementation that cannot run here.
    """
    settings = CrossEntropy() if settings is None else settings
    _check(hidden, weight=weight, labels=labels, weights=weights, bias=bias, settings=settings, vocabulary=vocabulary)
    impossible: dict[str, str] = {}
    unfit_for_triton = unfit(hidden, weight, bias)
    if unfit_for_triton is not None:
        impossible["triton"] = unfit_for_triton
    if vocabulary is not None:
        impossible["reference"] = "it needs the whole vocabulary in one place"
    if hidden.device.type == "cuda" and unfit_for_triton is None:
        automatic = "triton"
    else:
        automatic = "reference" if _is_small(hidden, vocabulary=vocabulary) else "chunked"
    chosen = choose("cross_entropy", automatic=automatic, impossible=impossible)
    if chosen == "reference":
        if torch.compiler.is_compiling():
            # How many tokens count is no part of a graph; what is not finite in padding must not reach the sums.
            counts = weights != 0
            hidden, labels = torch.where(counts[:, None], hidden, 0), torch.where(counts, labels, 0)
        else:
            kept = weights.nonzero()[:, 0]
            hidden, labels, weights = hidden[kept], labels[kept], weights[kept]
        return reference_cross_entropy(
            hidden, weight=weight, bias=bias, labels=labels, weights=weights, settings=settings
        )
    by_chunks = fused_cross_entropy if chosen == "triton" else chunked_cross_entropy
    return by_chunks(
        hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        weights=weights,
        settings=settings,
        vocabulary=vocabulary,
    )


def _is_small(hidden: Tensor, *, vocabulary: VocabularyShare | None) -> bool:
    """Whether so few tokens are in host memory that their logits are smaller than the weight, and the time is that of
    going over its gradient: chunks, which make it in the forward pass, scale it in the backward pass."""
    count, width = hidden.shape
    return vocabulary is None and hidden.is_cpu and not torch.compiler.is_compiling() and 2 * count <= width


def _check(
    hidden: Tensor,
    *,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None,
) -> None:
    """Checks all arguments.

    Raises:
        KernelError: at the first one that does not fit.
    """
    check_floating(hidden, op=_OP, argument="hidden")
    check_shape(hidden, op=_OP, argument="hidden", shape=(None, None), legend="[N, D]")
    count, width = hidden.shape
    check_shape(weight, op=_OP, argument="weight", shape=(None, width), legend="[V, D]")
    num_classes = weight.shape[0]
    check_shape(labels, op=_OP, argument="labels", shape=(count,), legend="[N]")
    check_shape(weights, op=_OP, argument="weights", shape=(count,), legend="[N]")
    check_device(weight, op=_OP, argument="weight", other=hidden, other_name="hidden")
    check_device(labels, op=_OP, argument="labels", other=hidden, other_name="hidden")
    check_device(weights, op=_OP, argument="weights", other=hidden, other_name="hidden")
    # Autocast leaves hidden states in a lower precision than the weights; the op casts as autocast would.
    if not autocast_on(hidden.device):
        check_like(weight, op=_OP, argument="weight", other=hidden, other_name="hidden")
    if bias is not None:
        check_shape(bias, op=_OP, argument="bias", shape=(num_classes,), legend="[V]")
        check_floating(bias, op=_OP, argument="bias")
        check_device(bias, op=_OP, argument="bias", other=hidden, other_name="hidden")
    if labels.dtype is not torch.int64:
        raise fail("labels", op=_OP, expected="be int64", came=labels.dtype, remedy="Cast labels before the call")
    if not 0.0 <= settings.label_smoothing < 1.0:
        raise fail(
            "label_smoothing",
            op=_OP,
            expected="be at least 0 and below 1",
            came=settings.label_smoothing,
            remedy="Set it to 0 for none",
        )
    if settings.soft_cap is not None and not settings.soft_cap > 0:
        raise fail("soft_cap", op=_OP, expected="be above 0", came=settings.soft_cap, remedy="Use None for no cap")
    if not settings.z_loss >= 0:
        raise fail("z_loss", op=_OP, expected="be at least 0", came=settings.z_loss, remedy="Set it to 0 for none")
    if settings.chunk is not None and settings.chunk < 1:
        raise fail("chunk", op=_OP, expected="be at least 1", came=settings.chunk, remedy="Use None for automatic")
    # In host memory the look costs nothing; on an accelerator it would wait for the device, and a graph cannot look.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and count:
        num_classes = num_classes if vocabulary is None else vocabulary.size
        counted = torch.where(weights != 0, labels, labels.new_zeros(()))
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= num_classes:
            raise fail(
                "labels",
                op=_OP,
                expected=f"lie in [0, {num_classes})",
                came=low if low < 0 else high,
                remedy="Check that the vocabulary of the data is the model's",
            )
