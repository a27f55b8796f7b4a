"""Projection and cross entropy by chunks of tokens: matrix products of torch around Triton's kernels.

The forward pass leaves the gradients, up to the scalar that the backward pass brings; logits of one chunk exist at a
time, and become their own gradient in place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.cross_entropy.configs import BUDGET, memory_budget, tokens_of_chunk
from megaseq.kernels.cross_entropy.operator import (
    Wanted,
    call,
    gradients,
    loss_sums,
    remember,
    settings_of,
    wanted_of,
)
from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums, VocabularyShare
from megaseq.kernels.functions import apply_many

WORTH_WAITING = 1 << 38
"""Tokens times width times classes from which on tokens of weight 0 are left out. The host must then wait for the
device to say how many remain. That costs more than the 30 microseconds of the answer: all that the host had launched
ahead is used up, and until it is ahead again the device waits for each launch, some hundred microseconds in all. Three
products of this size take about 3 milliseconds at 500 TFLOP/s, and packed rows have a few hundredths of padding, which
is as much."""

ROW_MULTIPLE = 16
"""Of the distance of two rows of logits: an odd vocabulary would make all kernels read number by number."""


@dataclass(frozen=True)
class Made:
    """What a pass over the tokens makes; gradients that are not wanted are empty."""

    sums: Tensor
    """[5]: loss, nll, correct, z_loss, weight; float32."""
    hidden: Tensor
    weight: Tensor
    bias: Tensor


@torch.library.custom_op("megaseq::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    numbers: list[float],
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [5] and the gradients of hidden states, weight and bias, empty where not `wanted`.

    Args:
        hidden: [N, D].
        weight: [V, D], of the same dtype.
        bias: [V] of the same dtype, or None.
        labels: int64 [N].
        weights: [N].
        numbers: label_smoothing, z_loss, scale, soft_cap (0: none), which become part of `CrossEntropy`.
        chunk: tokens of a chunk; 0: chosen here.
        wanted: for hidden, weight, bias.
    """
    made = run(
        hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        weights=weights,
        settings=settings_of(numbers, chunk),
        vocabulary=None,
        wanted=(wanted[0], wanted[1], wanted[2]),
    )
    return made.sums, made.hidden, made.weight, made.bias


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    numbers: list[float],
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _outputs(
        hidden, weight=weight, bias=bias, settings=settings_of(numbers, chunk), vocabulary=None, wanted=tuple(wanted)
    )
    return made.sums, made.hidden, made.weight, made.bias


linear_cross_entropy_op.register_autograd(gradients, setup_context=remember)


def fused_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None,
) -> LossSums:
    """`linear_cross_entropy` by chunks and Triton's kernels; shapes as there."""
    compute = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
    # Cast outside of the op, so that the gradient of a float32 weight is summed and left in float32 all the same.
    hidden = hidden.to(compute)
    if vocabulary is None:
        return call(
            linear_cross_entropy_op,
            hidden,
            weight=weight,
            bias=bias,
            labels=labels,
            weights=weights,
            settings=settings,
        )
    wanted = wanted_of(hidden, weight=weight, bias=bias)
    return loss_sums(apply_many(_Shared, hidden, weight, bias, labels, weights, settings, vocabulary, wanted)[0])


class _Shared(torch.autograd.Function):
    """The same, where ranks share the vocabulary: how they add up is no argument that an operator can have."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        settings: CrossEntropy,
        vocabulary: VocabularyShare,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        made = run(
            hidden,
            weight=weight,
            bias=bias,
            labels=labels,
            weights=weights,
            settings=settings,
            vocabulary=vocabulary,
            wanted=wanted,
        )
        output = made.sums, made.hidden, made.weight, made.bias
        remember(ctx, (hidden, weight, bias), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, *of_outputs)


def _chunk(hidden: Tensor, *, num_classes: int, settings: CrossEntropy, vocabulary: VocabularyShare | None) -> int:
    """Tokens of a chunk of `hidden` [n, D]."""
    if settings.chunk is not None:
        return settings.chunk
    return tokens_of_chunk(
        count=hidden.shape[0],
        # Ranks that share the vocabulary go over the same chunks, however uneven their parts and cards are.
        num_classes=num_classes if vocabulary is None else vocabulary.size,
        width=hidden.shape[1],
        item_size=hidden.element_size(),
        budget=memory_budget(hidden.device) if vocabulary is None else BUDGET,
    )


def _outputs(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None,
    wanted: tuple[bool, ...],
) -> Made:
    """What a pass makes, not yet written.

    The gradient of the weights is a sum over chunks in float32. That of a single chunk is one matrix product, which
    sums in float32 inside and is rounded once; only float16 could overflow before the scalar of the backward pass.
    """
    num_classes = weight.shape[0]
    several = hidden.shape[0] > _chunk(hidden, num_classes=num_classes, settings=settings, vocabulary=vocabulary)
    narrow = weight.dtype is torch.bfloat16 and not several
    summed = torch.bfloat16 if narrow else torch.float32
    like = functools.partial(torch.empty, device=hidden.device)
    return Made(
        sums=like(5, dtype=torch.float32),
        hidden=like(hidden.shape if wanted[0] else (0,), dtype=hidden.dtype),
        weight=like(weight.shape if wanted[1] else (0,), dtype=summed),
        bias=like((num_classes,) if wanted[2] and bias is not None else (0,), dtype=torch.float32),
    )


def run(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None,
    wanted: Wanted,
) -> Made:
    """Goes over the tokens, a chunk at a time; shapes as of `linear_cross_entropy`."""
    size = weight.shape[0] if vocabulary is None else vocabulary.size
    made = _outputs(hidden, weight=weight, bias=bias, settings=settings, vocabulary=vocabulary, wanted=wanted)
    tokens, places = _counted(hidden, labels=labels, weights=weights, made=made, sparse=_is_sparse(hidden, size=size))
    head = _Head(
        weight.to(hidden.dtype),
        bias=None if bias is None else bias.to(hidden.dtype),
        settings=settings,
        vocabulary=vocabulary,
        made=made,
    )
    _run(tokens, head=head)
    torch.cat([tokens.parts.sum(dim=1), tokens.weights.sum()[None]], out=made.sums)
    if wanted[0] and places is not None:
        made.hidden.zero_().index_copy_(0, places, tokens.gradient)
    return made


def _is_sparse(hidden: Tensor, *, size: int) -> bool:
    """Whether the tokens of weight 0 among `hidden` [N, D] are left out of the products with `size` classes."""
    return hidden.numel() * size >= WORTH_WAITING


def _counted(
    hidden: Tensor, *, labels: Tensor, weights: Tensor, made: Made, sparse: bool
) -> tuple[_Tokens, Tensor | None]:
    """The tokens to go over, and if these are not all, their places [n]."""
    places: Tensor | None = None
    if sparse:
        places = weights.nonzero()[:, 0]
        places = None if places.numel() == weights.numel() else places
    if places is not None:
        rows, labels, weights = (tensor.index_select(0, places) for tensor in (hidden, labels, weights))
    else:
        # What is not finite in padding, or no label, must not reach the sums.
        counts = weights != 0
        rows = hidden if sparse else torch.where(counts[:, None], hidden, 0)
        labels = labels if sparse else torch.where(counts, labels, 0)
    tokens = _Tokens(
        rows=rows,
        labels=labels.contiguous(),
        weights=weights.to(torch.float32).contiguous(),
        gradient=made.hidden if places is None or not made.hidden.numel() else torch.empty_like(rows),
        parts=torch.empty(4, rows.shape[0], dtype=torch.float32, device=rows.device),
    )
    return tokens, places


@dataclass(frozen=True)
class _Tokens:
    """Tokens that all count, or some of them."""

    rows: Tensor
    """[n, D]."""
    labels: Tensor
    """int64 [n]."""
    weights: Tensor
    """float32 [n]."""
    gradient: Tensor
    """[n, D], written; empty if not wanted."""
    parts: Tensor
    """float32 [4, n], written: loss, nll, correct, z_loss, weighted."""

    def part(self, start: int, stop: int) -> _Tokens:
        """The tokens from `start` to `stop`."""
        place = slice(start, stop)
        gradient = self.gradient[place] if self.gradient.numel() else self.gradient
        return _Tokens(self.rows[place], self.labels[place], self.weights[place], gradient, self.parts[:, place])


class _Head:
    """The projection to the vocabulary and what its gradients are summed in."""

    def __init__(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None,
        settings: CrossEntropy,
        vocabulary: VocabularyShare | None,
        made: Made,
    ) -> None:
        self.weight, self.bias, self.settings, self.vocabulary = weight, bias, settings, vocabulary
        self.of_weight, self.of_bias = made.weight, made.bias

    def logits(self, rows: Tensor, *, out: Tensor) -> None:
        """Writes the logits `out` [n, V] of `rows` [n, D], before the cap."""
        if self.bias is not None:
            torch.addmm(self.bias, rows, self.weight.t(), alpha=self.settings.scale, out=out)
        else:
            torch.addmm(out, rows, self.weight.t(), beta=0, alpha=self.settings.scale, out=out)

    def add(self, tokens: _Tokens, *, gradient: Tensor, first: bool) -> None:
        """Writes the gradient of the tokens and adds to those of the head.

        Args:
            tokens: of the chunk.
            gradient: of their logits, [n, V].
            first: whether nothing was added yet.
        """
        scale = self.settings.scale
        if tokens.gradient.numel():
            torch.addmm(tokens.gradient, gradient, self.weight, beta=0, alpha=scale, out=tokens.gradient)
        if self.of_weight.numel():
            add_product(self.of_weight, left=gradient.t(), right=tokens.rows, alpha=scale, beta=0 if first else 1)
        if self.of_bias.numel() and first:
            torch.sum(gradient, dim=0, dtype=torch.float32, out=self.of_bias)
        elif self.of_bias.numel():
            self.of_bias.add_(gradient.sum(dim=0, dtype=torch.float32))


def _run(tokens: _Tokens, *, head: _Head) -> None:
    """Goes over the chunks."""
    count, num_classes = tokens.rows.shape[0], head.weight.shape[0]
    chunk = _chunk(tokens.rows, num_classes=num_classes, settings=head.settings, vocabulary=head.vocabulary)
    graded = bool(tokens.gradient.numel() or head.of_weight.numel() or head.of_bias.numel())
    # Rows begin where a vector of 16 numbers can be read at once.
    buffer = tokens.rows.new_empty(min(chunk, count), -(-num_classes // ROW_MULTIPLE) * ROW_MULTIPLE)
    for start in range(0, count, chunk):
        part = tokens.part(start, min(start + chunk, count))
        logits = buffer[: part.rows.shape[0], :num_classes]
        head.logits(part.rows, out=logits)
        _losses(logits, tokens=part, head=head, graded=graded)
        if graded:
            head.add(part, gradient=logits, first=start == 0)
    if count == 0:
        head.of_weight.zero_()
        head.of_bias.zero_()


def _losses(logits: Tensor, *, tokens: _Tokens, head: _Head, graded: bool) -> None:
    """Writes the parts of one chunk, and its logits' gradient over the logits [n, V]."""
    from megaseq.kernels.cross_entropy import triton_kernels

    settings, vocabulary = head.settings, head.vocabulary
    if vocabulary is None:
        triton_kernels.launch_whole(
            logits, labels=tokens.labels, weights=tokens.weights, parts=tokens.parts, settings=settings, graded=graded
        )
        return
    here = torch.empty_like(tokens.parts, memory_format=torch.contiguous_format)
    triton_kernels.launch_part(logits, labels=tokens.labels, parts=here, first=vocabulary.first, settings=settings)
    top = vocabulary.maximum(here[0].clone())
    total, of_label, logit_sum = vocabulary.total(
        torch.stack([here[1] * (here[0] - top).exp(), here[2], here[3]])
    ).unbind()
    lse = top + total.log()
    nll, smoothing = lse - of_label, settings.label_smoothing
    loss = (1 - smoothing) * nll + smoothing * (lse - logit_sum / vocabulary.size) if smoothing else nll
    z_loss = settings.z_loss * lse.square()
    correct = (of_label >= top).to(torch.float32)
    weighted = torch.stack([loss + z_loss, nll, correct, z_loss]) * tokens.weights
    tokens.parts.copy_(torch.where(tokens.weights == 0, 0.0, weighted))
    if graded:
        triton_kernels.launch_gradient(
            logits,
            labels=tokens.labels,
            weights=tokens.weights,
            lse=lse,
            first=vocabulary.first,
            share=smoothing / vocabulary.size,
            settings=settings,
        )


def add_product(out: Tensor, *, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """`out = beta * out + alpha * left @ right`, summed in the dtype of `out`, [n, m], which may be float32.

    Args:
        out: float32, or of the dtype of the others.
        left: [n, k].
        right: [k, m].
        alpha: factor of the product.
        beta: factor of what `out` holds; 0: it is not read.
    """
    if out.dtype is left.dtype:
        torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    elif out.device.type == "cuda" and _widens(out.device, left.dtype):
        torch.addmm(out, left, right, out.dtype, beta=beta, alpha=alpha, out=out)
    elif beta:
        out.mul_(beta).add_(left @ right, alpha=alpha)
    else:
        torch.mul(left @ right, alpha, out=out)


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds products of `dtype` to float32 in one call, as it has since some release."""
    little = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, little, little, torch.float32, beta=1, alpha=1, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())
