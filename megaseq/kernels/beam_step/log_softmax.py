"""From logits to log-probabilities, and the best of them without writing the others."""

from __future__ import annotations

from typing import Any

import torch

from megaseq.base import native
from megaseq.kernels.beam_step.topk import row_topk

LOGITS_PER_THREAD = 1 << 18
"""Logits that are worth a further thread."""


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """fp32 log-probabilities of `logits` [..., V]; where all are -inf they stay -inf and do not become NaN.

    They are those of `log_softmax_topk`, bit for bit.
    """
    extension = _extension(logits)
    if extension is not None:
        _, _, shifts = _native(extension, logits=logits.reshape(-1, logits.shape[-1]), k=0)
        shifts = shifts.view(*logits.shape[:-1], 2)
        return (logits - shifts[..., :1]).sub_(shifts[..., 1:])
    # On a CPU this takes a fifth of the time of `logsumexp`, whose exp is not vectorised everywhere.
    result = logits.log_softmax(dim=-1, dtype=torch.float32)
    # A row of NaN comes from a row of -inf, or from NaN, which has to show. One column tells whether there is any.
    nan = result[..., 0].isnan()
    if nan.is_cuda or bool(nan.any()):
        dead = (logits == float("-inf")).all(dim=-1, keepdim=True)
        result = result.masked_fill(dead, float("-inf"))
    return result


def log_softmax_topk(logits: torch.Tensor, *, k: int, column: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best log-probabilities of each row of `logits` [R, V], and that of one column.

    Args:
        logits: Any float type.
        k: How many; the vocabulary bounds it.
        column: An id, wanted whether it is among the best or not.

    Returns:
        Values [R, k] and ids [R, k], best first, ties to the lower id; values [R] of `column`. A row of -inf stays
        -inf; NaN in a row shows in its first value.
    """
    extension = _extension(logits)
    if extension is None:
        scores = log_probabilities(logits)
        values, ids = row_topk(scores, k=k)
        return values, ids, scores[:, column]
    values, ids, shifts = _native(extension, logits=logits, k=min(k, logits.shape[1]))
    return values, ids, (logits[:, column] - shifts[:, 0]) - shifts[:, 1]


def _extension(logits: torch.Tensor) -> Any | None:
    fits = logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.shape[-1] > 0
    return native.extension() if fits else None


def _native(extension: Any, *, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and ids [R, k] of the best, and what log_softmax subtracts from each row, [R, 2]."""
    rows = logits.shape[0]
    values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.long)
    shifts = torch.empty(rows, 2)
    threads = max(1, min(torch.get_num_threads(), logits.numel() // LOGITS_PER_THREAD))
    array = logits.detach().contiguous().numpy()
    extension.log_softmax_top(array, values.numpy(), ids.numpy(), shifts.numpy(), threads)
    return values, ids, shifts
