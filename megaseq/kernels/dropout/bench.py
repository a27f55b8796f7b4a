"""What `megaseq bench kernels` proves and times of dropout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.bench.passes import both_passes, compare_passes, normal
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.dropout import dropout_add, mix_key
from megaseq.kernels.dropout.configs import configs
from megaseq.kernels.dropout.reference import keep_mask, threshold_of

KEY = (7, 11, 13)
RATE = 0.1
ROWS, WIDTH = 16384, 1024
"""Of a residual branch of T5-large."""


def bench_cases() -> list[BenchCase]:
    """The end of a residual branch."""
    return [BenchCase("dropout", "add_t5_large", check=compare, prepare=prepare, candidates={"dropout": configs()})]


def compare(device: torch.device) -> dict[str, Comparison]:
    """Output and gradients beside the reference: the same elements are zero."""
    inputs = _inputs(device, rows=64 if device.type == "cuda" else 9)
    return compare_passes(_ours, reference=_reference, inputs=inputs)


def prepare(device: torch.device) -> Timed:
    """Tensors of full size; on the host small ones."""
    inputs = _inputs(device, rows=ROWS if device.type == "cuda" else 9)
    # Forward values, residual and result; backward the gradient of the result and that of the values.
    moved = 5 * inputs[0].numel() * inputs[0].element_size()
    peers = {"torch": functools.partial(both_passes, _torch, inputs=inputs)}
    run = both_passes(_ours, inputs=inputs)
    return Timed(run, peers=peers, bytes=moved, goals={"ceiling": 0.85, "torch": 1.0})


def _inputs(device: torch.device, *, rows: int) -> list[Tensor]:
    dtype = proof_dtype(torch.bfloat16, device=device)
    return [normal(rows, WIDTH, device=device, dtype=dtype, seed=seed) for seed in range(2)]


def _ours(inputs: Sequence[Tensor]) -> Tensor:
    return dropout_add(inputs[0], residual=inputs[1], rate=RATE, key=KEY)


def _reference(inputs: Sequence[Tensor]) -> Tensor:
    values, residual = inputs
    key, threshold = mix_key(KEY), threshold_of(RATE)
    kept = keep_mask(values.numel(), key=key, offset=0, threshold=threshold, device=values.device)
    return residual + torch.where(kept.view(values.shape), values / (1 - RATE), 0.0)


def _torch(inputs: Sequence[Tensor]) -> Tensor:
    """Other elements become zero, as many of them."""
    return inputs[1] + functional.dropout(inputs[0], RATE)
