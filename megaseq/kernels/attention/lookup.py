"""Attention while decoding: few queries, whose keys and values stand anywhere in a cache. No gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.dispatch import requested

LANES = 8
"""Divides the width of a head; kLanes in csrc/vector.h."""
MACS_PER_THREAD = 1 << 20
"""Multiply-adds that are worth a further thread."""
_NO_COUNTS = np.empty(0, dtype=np.int64)
_NO_PLACES = np.empty((0, 0), dtype=np.int64)
_NO_BIAS = np.empty((0, 0), dtype=np.float32)


def fits_lookup(like: Tensor, *, head_dims: tuple[int, ...]) -> bool:
    """Whether the extension attends to keys of the kind of `like`, in heads of these widths, and may be used."""
    return (
        like.device.type == "cpu"
        and like.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and all(width % LANES == 0 for width in head_dims)
        and requested("attention") in ("auto", "native")
        and native.available()
    )


def attend_places(
    query: Tensor, *, key: Tensor, value: Tensor, places: Tensor, length: int, scale: float, bias: Tensor | None
) -> Tensor:
    """Attends from each query to keys of its own.

    Args:
        query: float32 [R, N, H] in host memory.
        key: [P, M, H], N a multiple of M.
        value: [P, M, H].
        places: [R, at least length], int64: query r sees the keys `places[r, :length]`.
        length: of what each query sees, at least 1.
        scale: factor of the scores.
        bias: added to the scores, [N, length].

    Returns:
        [R, N, H].
    """
    output = torch.empty(query.shape)
    _extension().attend_places(
        _array(query), _array(key), _array(value), output.numpy(), places.numpy(), _NO_COUNTS,
        _NO_BIAS if bias is None else _array(bias), length, 1, scale, _num_threads(query, length=length),
    )  # fmt: skip
    return output


def attend_shared(query: Tensor, *, key: Tensor, value: Tensor, counts: Tensor | None, scale: float) -> Tensor:
    """Attends from the queries of each row to the same keys.

    Args:
        query: float32 [B, K, N, H] in host memory.
        key: [B, S, M, H], N a multiple of M.
        value: [B, S, M, H].
        counts: [B], int64: the queries of row b see its first `counts[b]` keys; None: all S.
        scale: factor of the scores.

    Returns:
        [B, K, N, H].
    """
    output = torch.empty(query.shape)
    _extension().attend_places(
        _array(query.flatten(0, 1)), _array(key.flatten(0, 1)), _array(value.flatten(0, 1)),
        output.flatten(0, 1).numpy(), _NO_PLACES, _NO_COUNTS if counts is None else counts.numpy(), _NO_BIAS,
        key.shape[1], query.shape[1], scale, _num_threads(query, length=key.shape[1]),
    )  # fmt: skip
    return output


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    array: NDArray[Any] = tensor.detach().numpy()
    return array


def _num_threads(query: Tensor, *, length: int) -> int:
    return max(1, min(torch.get_num_threads(), 2 * query.numel() * length // MACS_PER_THREAD))


def _extension() -> Any:
    extension = native.extension()
    if extension is None:
        raise RuntimeError("attention: the compiled extension must not go away while the process runs.")
    return extension
