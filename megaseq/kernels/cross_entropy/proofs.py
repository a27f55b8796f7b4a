"""What `megaseq bench kernels` proves of the cross entropy on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import compare_passes, in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.cross_entropy import CrossEntropy, VocabularyShare, linear_cross_entropy
from megaseq.kernels.cross_entropy.cases import CASES, TOLERANCE, CrossEntropyCase
from megaseq.kernels.cross_entropy.reference import reference_cross_entropy

IN_OTHER_TYPES = ("plain", "smoothing_scale_chunks", "z_loss_chunks")
"""Names of cases that are proven in float32 and float16 too."""
SHARED = CrossEntropyCase(
    "share_of_the_vocabulary", settings=CrossEntropy(label_smoothing=0.1, z_loss=0.01, scale=0.5, chunk=4)
)
FIRST = 700
"""First class of the share."""


def proof_cases() -> list[BenchCase]:
    """All calls, and one with a share of the vocabulary."""
    found = [
        BenchCase("cross_entropy", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES)
    ]
    shared = [
        BenchCase(
            "cross_entropy", f"{SHARED.name}_{short(dtype)}", functools.partial(compare_share, SHARED, dtype=dtype)
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return [*found, *shared]


def compare(case: CrossEntropyCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Sums and gradients beside those of the reference in float64."""
    tensors = case.tensors(dtype=dtype, device=device.type)
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def run(function: object, inputs: Sequence[Tensor]) -> list[Tensor]:
        arguments = {"bias": None, **dict(zip(names, inputs, strict=True)), "settings": case.settings}
        sums = function(**arguments)  # type: ignore[operator]
        # Rounded logits may tie with the highest.
        return [sums.loss, sums.nll, sums.z_loss, sums.weight, *[sums.correct] * (dtype is torch.float32)]

    return compare_passes(
        functools.partial(run, linear_cross_entropy),
        reference=functools.partial(run, reference_cross_entropy),
        inputs=[tensor for tensor in tensors.values() if tensor is not None],
        tolerance=TOLERANCE[dtype],
    )


def compare_share(case: CrossEntropyCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """The share from class `FIRST` on of a rank whose only neighbour has the classes before it."""
    tensors = case.tensors(dtype=dtype, device=device.type)
    labels, weights = tensors["labels"], tensors["weights"]
    whole = [tensor.detach() for name in ("hidden", "weight", "bias") if (tensor := tensors[name]) is not None]
    assert labels is not None and weights is not None
    scale = case.settings.scale
    # Their logits, of which this rank hears sums alone.
    elsewhere = (whole[0].double() * scale) @ whole[1][:FIRST].double().T + whole[2][:FIRST].double()
    leaves = [whole[0].clone(), whole[1][FIRST:].clone(), whole[2][FIRST:].clone()]

    def ours(inputs: Sequence[Tensor]) -> Tensor:
        share = _with_neighbour(
            elsewhere, labels=labels, size=case.num_classes, chunk=case.settings.chunk or case.count
        )
        hidden, weight, bias = inputs
        return linear_cross_entropy(
            hidden, weight=weight, bias=bias, labels=labels, weights=weights, settings=case.settings, vocabulary=share
        ).loss

    def theirs(inputs: Sequence[Tensor]) -> Tensor:
        hidden, weight, bias = inputs
        logits = torch.cat([elsewhere, (hidden * scale) @ weight.T + bias], dim=1)
        identity = torch.eye(case.num_classes, device=device, dtype=torch.float64)
        plain = CrossEntropy(label_smoothing=case.settings.label_smoothing, z_loss=case.settings.z_loss)
        return reference_cross_entropy(
            logits, weight=identity, bias=None, labels=labels, weights=weights.double(), settings=plain
        ).loss

    inputs = [leaf.requires_grad_() for leaf in leaves]
    return compare_passes(ours, reference=theirs, inputs=inputs, tolerance=TOLERANCE[dtype])


def _with_neighbour(logits: Tensor, *, labels: Tensor, size: int, chunk: int) -> VocabularyShare:
    """What this rank is told, with the logits [N, V'] of the classes before its own of `size`; it asks by chunks."""
    tops: list[Tensor] = []

    def rows() -> tuple[Tensor, Tensor]:
        place = slice((len(tops) - 1) * chunk, len(tops) * chunk)
        return logits[place], labels[place]

    def maximum(mine: Tensor) -> Tensor:
        tops.append(mine)
        tops[-1] = torch.maximum(mine, rows()[0].amax(dim=1).to(mine.dtype))
        return tops[-1]

    def total(mine: Tensor) -> Tensor:
        theirs, wanted = rows()
        there = wanted < logits.shape[1]
        of_label = theirs.gather(1, torch.where(there, wanted, 0)[:, None])[:, 0].where(there, 0.0)
        parts = [(theirs - tops[-1][:, None]).exp().sum(dim=1), of_label, theirs.sum(dim=1)]
        return mine + torch.stack(parts).to(mine.dtype)

    return VocabularyShare(logits.shape[1], size, total=total, maximum=maximum)
