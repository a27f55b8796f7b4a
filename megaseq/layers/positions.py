"""Absolute positions, added to embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import FROM_PARENT
from megaseq.base.errors import MegaseqError, must
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Gaussian, Initializer


class Positions(Layer):
    """Base of the absolute positions: a vector of width D for each position of a segment."""

    class Params(Layer.Params):
        model_dim: int = FROM_PARENT
        """Width D."""
        offset: int = 0
        """Index of the first position in the table (2 in BART, whose table starts with its padding rows)."""
        zero_padding: bool = False
        """Whether padding (segment id 0) gets a zero vector, as in fairseq and M2M100."""

        def validate(self) -> Iterator[str]:
            """Refuses a negative offset."""
            if self.offset < 0:
                yield f"offset: must be at least 0, but is {self.offset}. BART has 2, most others 0."

    params: Params

    @property
    def most(self) -> int | None:
        """How many positions there are; None: as many as are wanted."""
        return None

    def lookup(self, positions: Tensor, *, dtype: torch.dtype, length: int) -> Tensor:
        """Returns the vectors [..., D] of the 0-based `positions` [...], each below `length`."""
        raise NotImplementedError

    def at(self, position: int, *, like: Tensor) -> Tensor:
        """Returns the vector [D] of one position, in the dtype and on the device of `like`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, positions: Tensor, segment_ids: Tensor | None = None, length: int | None = None
    ) -> Tensor:
        """Adds positions to embeddings.

        Args:
            x: embeddings [B, T, D].
            positions: 0-based, restarting in every segment, [B, T] or, the same in every row, [1, T].
            segment_ids: [B, T], 0 is padding; None where there is none.
            length: of the whole rows, where `x` has a part of each; None: T.

        Returns:
            [B, T, D].
        """
        vectors = self.lookup(positions, dtype=x.dtype, length=length or positions.shape[-1])
        if self.params.zero_padding and segment_ids is not None:
            vectors = vectors * (segment_ids > 0).unsqueeze(-1).to(vectors.dtype)
        return x + vectors


class LearnedPositions(Positions):
    """A trained vector for each position."""

    class Params(Positions.Params):
        max_positions: int = 1024
        """Positions that the table holds, after the offset."""
        init: Initializer.Params = Gaussian.Params(std=0.02)
        """First values."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.weight = self.create_parameter(
            "weight", shape=(p.max_positions + p.offset, p.model_dim), axes=(None, "model"), init=p.init.instantiate()
        )

    @property
    def most(self) -> int:
        """How many positions the table holds, after the offset."""
        return self.params.max_positions

    def lookup(self, positions: Tensor, *, dtype: torch.dtype, length: int) -> Tensor:
        """Returns the vectors [..., D] of `positions` [...], each below `length`.

        Raises:
            ParamsError: more positions in a row than the table holds.
        """
        # Positions count by one, so a row's length bounds them without reading the values back from a device.
        if length > self.params.max_positions and int(positions.max()) >= self.params.max_positions:
            raise self._too_short(int(positions.max()) + 1)
        return functional.embedding(positions + self.params.offset, self.weight).to(dtype)

    def at(self, position: int, *, like: Tensor) -> Tensor:
        """Returns the vector [D] of one position, in the dtype and on the device of `like`.

        Raises:
            ParamsError: a position after the table's last.
        """
        if position >= self.params.max_positions:
            raise self._too_short(position + 1)
        return self.weight[position + self.params.offset].to(like.dtype)

    def _too_short(self, length: int) -> MegaseqError:
        path = f"{self.path or 'positions'}.max_positions"
        return must(path, "cover the longest sequence", self.params.max_positions, f"Raise it to {length}")


class SinusoidalPositions(Positions):
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5) in the layouts that model families use."""

    class Params(Positions.Params):
        layout: Literal["interleaved", "half_split"] = "interleaved"
        """`interleaved`: sine and cosine by turns (Vaswani et al.); `half_split`: all sines, then all cosines."""
        endpoint: bool = False
        """Whether the longest wave is exactly `max_timescale` (tensor2tensor, fairseq, M2M100), or one step shorter
        (Vaswani et al., Marian)."""
        max_timescale: float = 10000.0
        """Length of the longest wave, in units of 2 pi positions."""

        def validate(self) -> Iterator[str]:
            """Refuses a width without room for the waves."""
            yield from super().validate()
            if isinstance(self.model_dim, int) and self.model_dim < 4:
                yield f"model_dim: must be at least 4, but is {self.model_dim}. Widen the model."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._table = torch.empty(0, p.model_dim)

    def _make_table(self, length: int) -> Tensor:
        """Returns the first `length` positions [length, D], computed in float64 because the angles are large."""
        p = self.params
        half = (p.model_dim + 1) // 2
        steps = (p.model_dim // 2 - 1) if p.endpoint else p.model_dim / 2
        rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(p.max_timescale) / steps))
        angles = (torch.arange(length, dtype=torch.float64) + p.offset).unsqueeze(1) * rates
        sines, cosines = angles.sin(), angles.cos()[:, : p.model_dim // 2]
        if p.layout == "half_split":
            if p.endpoint and p.model_dim % 2:  # fairseq pads an odd width with a zero column at the end
                return torch.cat([sines[:, :-1], cosines, torch.zeros(length, 1)], dim=1).float()
            return torch.cat([sines, cosines], dim=1).float()
        table = torch.empty(length, p.model_dim)
        table[:, 0::2], table[:, 1::2] = sines, cosines
        return table

    def table(self, length: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns at least the first `length` positions [>= length, D]; kept between calls."""
        table = self._table
        if table.shape[0] < length or table.device != device or table.dtype != dtype:
            table = self._make_table(max(length, 256, 2 * table.shape[0] if table.shape[0] < length else length))
            self._table = table = table.to(device=device, dtype=dtype)
        return table

    def lookup(self, positions: Tensor, *, dtype: torch.dtype, length: int) -> Tensor:
        """Returns the vectors [..., D] of `positions` [...], each below `length`."""
        table = self.table(length, device=positions.device, dtype=dtype)
        return functional.embedding(positions, table)

    def at(self, position: int, *, like: Tensor) -> Tensor:
        """Returns the vector [D] of one position, in the dtype and on the device of `like`."""
        return self.table(position + 1, device=like.device, dtype=like.dtype)[position]
