"""Projection and cross entropy a chunk of tokens at a time, the gradient made while the chunk's softmax is in cache.

The full logits [N, V] never exist, and nothing is computed twice: the forward pass turns each chunk's probabilities
into the gradients of hidden states and weights, up to the one scalar that the backward pass brings.

Terms of the logits' gradient that are the same for all classes or all of one row are not applied to the [chunk, V]
buffer. With p the softmax, e the smoothing, w a token's weight, y its label and c = w * (1 + 2 * z_loss * lse):

    d loss / d logits = c * p - w * (1 - e) * onehot(y) - w * e / V

c scales a row of the products, and the last term contributes an outer product of sums; both cost O(D) a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums, VocabularyShare
from megaseq.kernels.functions import apply_many, autocast_on, without_autocast

CHUNK_BYTES = 64 << 20
"""Size of one chunk's logits in bytes, at most; there are two such buffers."""
MIN_CHUNK, MAX_CHUNK = 128, 1024
"""Tokens of a chunk. Fewer cost speed: each chunk reads the weights and adds to their gradient; more save no time."""
STEEP = 60.0
"""How far below a row's highest its logits lie at most, in the softmax: probabilities of 1e-26 stand for those below,
whose products would be numbers that processors take a hundred times as long for (subnormal ones)."""
SAMPLE = 16
"""One row in so many is looked at for such logits; where it has none, the chunk is spared a pass over its logits."""


def chunked_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None = None,
) -> LossSums:
    """`linear_cross_entropy` by chunks; shapes as there."""
    if vocabulary is None and (torch.compiler.is_compiling() or hidden.is_meta):
        # How many tokens count is known when it runs, by one operator: no graph and no meta tensor says it.
        from megaseq.kernels.cross_entropy.chunked_op import as_operator

        return as_operator(hidden, weight=weight, bias=bias, labels=labels, weights=weights, settings=settings)
    return LossSums(*apply_many(_LinearCrossEntropy, hidden, weight, bias, labels, weights, settings, vocabulary))


def sums_of(
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: CrossEntropy,
    vocabulary: VocabularyShare | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[ChunkedSums, Tensor | None]:
    """The sums over the tokens that count, and if these are not all, their places [n].

    Args:
        hidden: [N, D] in the dtype of the products.
        weight: [V, D].
        bias: [V].
        labels: int64 [N].
        weights: [N].
        settings: as of `linear_cross_entropy`.
        vocabulary: likewise.
        wanted: which gradients: of hidden, weight, bias.
    """
    places: Tensor | None = weights.nonzero()[:, 0]
    if places is None or places.numel() == weights.numel():
        places = None
    else:
        hidden, labels, weights = (each.index_select(0, places) for each in (hidden, labels, weights))
    compute = hidden.dtype
    # Autocast would round the sums over tokens too, and with them the losses and how many tokens there are.
    with without_autocast(hidden.device):
        head = _Head(
            weight=weight.to(compute),
            bias=None if bias is None else bias.to(compute),
            settings=settings,
            vocabulary=vocabulary,
        )
        return _run(hidden, head=head, labels=labels, weights=weights, wanted=wanted), places


@dataclass
class ChunkedSums:
    """Running sums over chunks: scalars of the loss, gradients where they are wanted."""

    scalars: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        settings: CrossEntropy,
        vocabulary: VocabularyShare | None,
    ) -> tuple[Tensor, ...]:
        sums, places = sums_of(
            hidden.to(compute_dtype(hidden)),
            weight=weight,
            bias=bias,
            labels=labels,
            weights=weights,
            settings=settings,
            vocabulary=vocabulary,
            wanted=ctx.needs_input_grad[:3],
        )
        ctx.hidden_like = (hidden.shape, hidden.dtype)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias, places)
        outputs = tuple(sums.scalars.unbind())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        of_rows, of_weight, of_bias, places = ctx.saved_tensors
        shape, dtype = ctx.hidden_like
        of_hidden = None
        if of_rows is not None:
            of_hidden = (of_rows * gradient).to(dtype)
            if places is not None:
                of_hidden = of_hidden.new_zeros(shape).index_copy_(0, places, of_hidden)
        return (
            of_hidden,
            None if of_weight is None else (of_weight * gradient).to(ctx.dtypes[0]),
            None if of_bias is None else (of_bias * gradient).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def _run(rows: Tensor, *, head: _Head, labels: Tensor, weights: Tensor, wanted: tuple[bool, bool, bool]) -> ChunkedSums:
    """Goes over the chunks of rows [n, D], all of which count."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    weight, bias, settings = head.weight, head.bias, head.settings
    count, num_classes = rows.shape[0], weight.shape[0]
    sums = ChunkedSums(
        scalars=torch.zeros(5, dtype=precise, device=rows.device),
        hidden=torch.empty(rows.shape, dtype=precise, device=rows.device) if wanted[0] else None,
        weight=torch.zeros(weight.shape, dtype=precise, device=rows.device) if wanted[1] else None,
        bias=torch.zeros(num_classes, dtype=precise, device=rows.device) if wanted[2] and bias is not None else None,
    )
    # By the whole vocabulary: ranks that share it go over the same chunks, however uneven their parts are.
    chunk = settings.chunk or min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // (head.num_classes * rows.element_size())))
    # Equal chunks: a short last one would run its matrix products at a lower speed.
    pieces = max(1, -(-count // chunk))
    chunk = max(1, -(-count // pieces))
    logits = rows.new_empty(chunk, num_classes)
    probabilities = torch.empty(chunk, num_classes, dtype=precise, device=rows.device)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        size = part.stop - part.start
        scaled = rows[part] * settings.scale if settings.scale != 1.0 else rows[part]
        _chunk(
            scaled,
            labels=labels[part],
            weights=weights[part].to(precise),
            buffers=(logits[:size], probabilities[:size]),
            head=head,
            sums=sums,
            place=part,
        )
    if sums.hidden is not None and settings.scale != 1.0:
        sums.hidden.mul_(settings.scale)
    head.finish(sums)
    return sums


class _Head:
    """The head, and the uniform part of the smoothed target as sums over classes and over tokens."""

    def __init__(
        self, *, weight: Tensor, bias: Tensor | None, settings: CrossEntropy, vocabulary: VocabularyShare | None
    ) -> None:
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.weight, self.bias, self.settings, self.vocabulary = weight, bias, settings, vocabulary
        self.num_classes = weight.shape[0] if vocabulary is None else vocabulary.size
        self.share = settings.label_smoothing / self.num_classes
        # With a soft cap the sum of the logits is not linear in the hidden state; the chunk then does it in full.
        self.linear = self.share > 0 and settings.soft_cap is None
        self.class_sum = weight.sum(dim=0, dtype=precise) if self.linear else None
        self.bias_sum = bias.sum(dtype=precise) if self.linear and bias is not None else None
        self.token_sum: Tensor | None = None
        self.token_weight: Tensor | None = None

    def logit_sum(self, rows: Tensor) -> Tensor:
        """The sum of the logits of each row [n, D] over all classes that are here: [n]."""
        assert self.class_sum is not None
        total = rows.to(self.class_sum.dtype) @ self.class_sum
        return total if self.bias_sum is None else total + self.bias_sum

    def count(self, rows: Tensor, *, weights: Tensor) -> None:
        """Remembers rows [n, D] with weights [n] for `finish`."""
        token_sum = weights @ rows.to(weights.dtype)
        self.token_sum = token_sum if self.token_sum is None else self.token_sum + token_sum
        self.token_weight = weights.sum() if self.token_weight is None else self.token_weight + weights.sum()

    def finish(self, sums: ChunkedSums) -> None:
        """Adds this part of the gradient of weight and bias."""
        if not self.linear or self.token_sum is None or self.token_weight is None:
            return
        if sums.weight is not None:
            sums.weight.sub_(self.share * self.token_sum)
        if sums.bias is not None:
            sums.bias.sub_(self.share * self.token_weight)


def _chunk(
    rows: Tensor,
    *,
    labels: Tensor,
    weights: Tensor,
    buffers: tuple[Tensor, Tensor],
    head: _Head,
    sums: ChunkedSums,
    place: slice,
) -> None:
    """One chunk: adds its share to `sums`. `rows` [n, D] are already scaled; `buffers` are two of [n, V]."""
    settings, weight, bias = head.settings, head.weight, head.bias
    logits, probabilities = buffers
    if bias is None:
        torch.mm(rows, weight.t(), out=logits)
    else:
        torch.addmm(bias, rows, weight.t(), out=logits)
    if settings.soft_cap is not None:
        logits.div_(settings.soft_cap).tanh_().mul_(settings.soft_cap)
    precise = probabilities.dtype
    smoothing = settings.label_smoothing
    total: Tensor | None = None
    if smoothing > 0:
        total = head.logit_sum(rows) if head.linear else logits.sum(dim=-1, dtype=precise)
    column, here = labels[:, None], None
    if head.vocabulary is None:
        top, of_label = logits.amax(dim=-1), logits.gather(1, column)[:, 0].to(precise)
        if settings.soft_cap is None and _is_steep(logits, top=top):
            torch.maximum(logits, (top - STEEP)[:, None], out=logits)
        torch.softmax(logits, dim=-1, dtype=precise, out=probabilities)
        # The highest probability is at least 1 / V, so its logarithm is exact where that of the label could underflow.
        top = top.to(precise)
        normaliser = top - probabilities.amax(dim=-1).log_()
    else:
        column, here = _columns_here(column, vocabulary=head.vocabulary, count=weight.shape[0])
        of_label = torch.where(here, logits.gather(1, column), 0.0)[:, 0].to(precise)
        top, normaliser, of_label, total = _shared_softmax(
            logits, probabilities=probabilities, of_label=of_label, total=total, vocabulary=head.vocabulary
        )
    nll = normaliser - of_label
    loss = nll
    if total is not None:
        loss = (1 - smoothing) * nll + smoothing * (normaliser - total / head.num_classes)
    z_loss = settings.z_loss * normaliser.square()
    parts = torch.stack((loss + z_loss, nll, (of_label >= top).to(precise), z_loss, torch.ones_like(nll)))
    sums.scalars += parts @ weights
    if sums.hidden is None and sums.weight is None and sums.bias is None:
        return
    on_label = probabilities.new_full((1, 1), -(1 - smoothing)).expand(column.shape)
    row_factor = _logits_gradient(
        logits,
        probabilities=probabilities,
        column=column,
        on_label=on_label if here is None else on_label * here,
        weights=weights,
        lse=normaliser,
        head=head,
    )
    _products(
        rows,
        weight=weight,
        gradient=probabilities,
        row_factor=row_factor,
        weights=weights,
        head=head,
        sums=sums,
        place=place,
    )


def _is_steep(logits: Tensor, *, top: Tensor) -> bool:
    """Whether some row of a sample of logits [n, V], each row's highest in `top` [n], is steeper than `STEEP`."""
    return bool((top[::SAMPLE] - logits[::SAMPLE].amin(dim=-1) > STEEP).any())


def _columns_here(column: Tensor, *, vocabulary: VocabularyShare, count: int) -> tuple[Tensor, Tensor]:
    """Returns the places [n, 1] of labels among the `count` classes here, 0 for those elsewhere, and which are here."""
    column = column - vocabulary.first
    here = (column >= 0) & (column < count)
    return torch.where(here, column, 0), here


def _shared_softmax(
    logits: Tensor, *, probabilities: Tensor, of_label: Tensor, total: Tensor | None, vocabulary: VocabularyShare
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Turns logits [n, part of V] into probabilities among all classes.

    Args:
        logits: of the classes that are here.
        probabilities: is overwritten, in the shape of `logits`.
        of_label: logits [n] of labels that are here, zero for others.
        total: sums [n] of the logits that are here, or None.
        vocabulary: how ranks add up.

    Returns:
        For each row, of all classes: the highest logit, the normaliser, the label's logit, the sum of logits.
    """
    top = vocabulary.maximum(logits.amax(dim=-1).to(probabilities.dtype))
    torch.sub(logits, top[:, None], out=probabilities)
    probabilities.clamp_(min=-STEEP).exp_()
    parts = [probabilities.sum(dim=-1), of_label]
    if total is not None:
        parts.append(total)
    sums = vocabulary.total(torch.stack(parts))
    probabilities.div_(sums[0][:, None])
    return top, top + sums[0].log(), sums[1], sums[2] if total is not None else None


def _logits_gradient(
    logits: Tensor,
    *,
    probabilities: Tensor,
    column: Tensor,
    on_label: Tensor,
    weights: Tensor,
    lse: Tensor,
    head: _Head,
) -> Tensor | None:
    """Turns probabilities [n, V] into the logits' gradient, in place, but for the terms that `_products` adds.

    Returns:
        A factor of each row that is still to be applied, [n], or None.
    """
    settings = head.settings
    if settings.z_loss == 0 and settings.soft_cap is None:
        probabilities.scatter_add_(1, column, on_label)
        return weights
    probabilities.mul_((weights * (1 + 2 * settings.z_loss * lse))[:, None])
    probabilities.scatter_add_(1, column, on_label * weights[:, None])
    if settings.soft_cap is not None:
        if settings.label_smoothing > 0:
            probabilities.sub_((head.share * weights)[:, None])
        probabilities.mul_(1 - (logits.to(probabilities.dtype) / settings.soft_cap).square_())
    return None


def _products(
    rows: Tensor,
    *,
    weight: Tensor,
    gradient: Tensor,
    row_factor: Tensor | None,
    weights: Tensor,
    head: _Head,
    sums: ChunkedSums,
    place: slice,
) -> None:
    """Adds the products of the logits' gradient [n, V] with weights and rows to `sums`."""
    precise = gradient.dtype
    cast = gradient.to(weight.dtype)
    if sums.hidden is not None:
        out = sums.hidden[place]
        if weight.dtype is precise:
            torch.mm(cast, weight, out=out)
        else:
            out.copy_(cast @ weight)
        if row_factor is not None:
            out.mul_(row_factor[:, None])
        if head.linear and head.class_sum is not None:
            out.addr_(weights, head.class_sum, alpha=-head.share)
    if sums.weight is not None:
        weighted = rows if row_factor is None else rows * row_factor[:, None].to(rows.dtype)
        if weight.dtype is precise:
            sums.weight.addmm_(cast.t(), weighted)
        else:
            sums.weight.add_(cast.t() @ weighted)
    if sums.bias is not None:
        sums.bias.add_(gradient.sum(dim=0) if row_factor is None else row_factor @ gradient)
    if head.linear:
        head.count(rows, weights=weights)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, which inside of the op it is not."""
    if autocast_on(hidden.device) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype
