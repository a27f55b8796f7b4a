"""Rotary positions (Su et al. 2021): queries and keys are turned by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from megaseq.base import FROM_PARENT
from megaseq.kernels.rotary import rotate
from megaseq.layers.base import Layer

Rotation = tuple[Tensor, Tensor]
"""(cosines, sines) of a row, [B or 1, T, 1, R] each, R the turned width of a head."""
RotationKey = tuple[int, float, str, float]
"""What a rotation depends on, besides the positions."""


class Rotary(Layer):
    """Turns pairs of elements of each head, so that scores depend on distances alone."""

    class Params(Layer.Params):
        head_dim: int = FROM_PARENT
        """Width H of a head."""
        theta: float = 10000.0
        """Base of the wave lengths."""
        fraction: float = 1.0
        """Share of the head that is turned, from its start; the rest carries no position."""
        layout: Literal["half_split", "interleaved"] = "half_split"
        """Pairs are (i, i + R/2), as in GPT-NeoX and Llama, or neighbours (2i, 2i + 1), as in GPT-J and Moonshine."""
        scale: float = 1.0
        """Positions are divided by this (linear context extension)."""

        def validate(self) -> Iterator[str]:
            """Refuses a share that leaves no pair."""
            if not 0 < self.fraction <= 1:
                yield f"fraction: must be in (0, 1], but is {self.fraction}. 1.0 turns the whole head."
            elif int(self.head_dim * self.fraction) // 2 < 1:
                yield f"fraction: must leave a pair to turn, but is {self.fraction}. Raise it or head_dim."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.width = int(p.head_dim * p.fraction) // 2 * 2
        self.key: RotationKey = (self.width, p.theta, p.layout, p.scale)

    def rotation(self, positions: Tensor) -> Rotation:
        """Returns the cosines and sines of `positions` [B or 1, T], in float32."""
        p = self.params
        exponents = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angles = (positions.float() / p.scale).unsqueeze(-1) / p.theta**exponents
        if p.layout == "half_split":
            angles = torch.cat([angles, angles], dim=-1)
        else:
            angles = angles.repeat_interleave(2, dim=-1)
        return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)

    def forward(self, x: Tensor, *, rotation: Rotation) -> Tensor:
        """Turns `x` [B, T, N, H] by what `rotation` returned; returns [B, T, N, H]."""
        cosines, sines = rotation
        return rotate(x, cosines=cosines, sines=sines, interleaved=self.params.layout == "interleaved")
