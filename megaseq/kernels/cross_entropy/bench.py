"""What `megaseq bench kernels` proves and times of the cross entropy: heads of T5 and Transformer-big in training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.bench.passes import both_passes, compare_passes, normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.cross_entropy import CrossEntropy, VocabularyShare, linear_cross_entropy
from megaseq.kernels.cross_entropy.chunked import chunked_cross_entropy
from megaseq.kernels.cross_entropy.configs import configs
from megaseq.kernels.cross_entropy.reference import reference_cross_entropy


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch's tokens, and the vocabulary."""

    name: str
    tokens: int
    classes: int
    width: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    shared: bool = False
    """By the kernels for a share of the vocabulary, which here is all of it."""

    @property
    def settings(self) -> CrossEntropy:
        """What the op is told."""
        return CrossEntropy(label_smoothing=self.label_smoothing, z_loss=self.z_loss)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """hidden [N, D] and weight [V, D], which want gradients, labels [N], weights [N]."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        hidden = normal(self.tokens, self.width, device=device, dtype=dtype)
        weight = normal(self.classes, self.width, device=device, dtype=dtype, seed=1, trained=False) * 0.1
        labels = torch.arange(self.tokens, device=device) * 7919 % self.classes
        return [hidden, weight.requires_grad_(), labels, torch.ones(self.tokens, device=device)]

    def small(self, *, on_gpu: bool = False) -> Shape:
        """Sizes for a proof, for which a GPU needs the same compiled kernels as for the timed ones."""
        if on_gpu:
            return dataclasses.replace(self, tokens=512)
        return dataclasses.replace(self, tokens=37, classes=1500, width=64)


SHAPES = (
    Shape("t5_large_32k_tokens", 32768, 32128, 1024, z_loss=1e-4),
    Shape("t5_large_4k_tokens", 4096, 32128, 1024, z_loss=1e-4),
    Shape("t5_xl_16k_tokens", 16384, 32128, 2048, z_loss=1e-4),
    Shape("transformer_big_16k_tokens", 16384, 32768, 1024, label_smoothing=0.1),
    Shape("transformer_big_1k_tokens", 1024, 32768, 1024, label_smoothing=0.1),
    Shape("t5_large_4k_tokens_share", 4096, 32128, 1024, label_smoothing=0.1, z_loss=1e-4, shared=True),
)
KERNELS = ("cross_entropy", "cross_entropy_part", "cross_entropy_gradient")


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "cross_entropy",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates=dict.fromkeys(KERNELS, configs()),
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Loss and gradients beside the reference."""
    shape = shape.small(on_gpu=device.type == "cuda")
    ours, theirs = functools.partial(_ours, shape), functools.partial(_reference, shape)
    return compare_passes(ours, reference=theirs, inputs=shape.inputs(device))


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size; on the host small ones."""
    shape = shape if device.type == "cuda" else shape.small()
    inputs = shape.inputs(device)
    peers = {
        "plain": functools.partial(both_passes, functools.partial(_plain, shape), inputs=inputs),
        "liger_style": functools.partial(both_passes, functools.partial(_liger_style, shape), inputs=inputs),
    }
    run = both_passes(functools.partial(_ours, shape), inputs=inputs)
    goals = {"plain": 1.0, "liger_style": 1.0}
    if shape.tokens >= 16384:
        goals["plain:memory"] = 2.0
    return Timed(run, peers=peers, flops=6.0 * shape.tokens * shape.classes * shape.width, goals=goals)


def _ours(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    hidden, weight, labels, weights = inputs
    share = VocabularyShare(0, shape.classes, total=_alone, maximum=_alone) if shape.shared else None
    return linear_cross_entropy(
        hidden, weight=weight, labels=labels, weights=weights, settings=shape.settings, vocabulary=share
    ).loss


def _alone(tensor: Tensor) -> Tensor:
    """The sum and the largest over one rank."""
    return tensor


def _reference(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    hidden, weight, labels, weights = inputs
    return reference_cross_entropy(
        hidden, weight=weight, bias=None, labels=labels, weights=weights, settings=shape.settings
    ).loss


def _plain(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    """What models without a fused head do: all logits, in float32 for the softmax."""
    hidden, weight, labels, _ = inputs
    logits = functional.linear(hidden, weight).float()
    loss = functional.cross_entropy(logits, labels, label_smoothing=shape.label_smoothing, reduction="sum")
    return loss + shape.z_loss * logits.logsumexp(dim=-1).square().sum() if shape.z_loss else loss


def _liger_style(shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
    """By chunks as small as Liger's: the logits of one take as much memory as the hidden states of all."""
    hidden, weight, labels, weights = inputs
    pieces = -(-shape.classes // shape.width)
    chunk = 1 << (-(-shape.tokens // pieces) - 1).bit_length()
    settings = dataclasses.replace(shape.settings, chunk=chunk)
    return chunked_cross_entropy(
        hidden, weight=weight, bias=None, labels=labels, weights=weights, settings=settings
    ).loss
