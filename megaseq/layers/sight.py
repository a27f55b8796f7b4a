"""What the layers of a stack share for one batch: who sees whom, where tokens stand, which of them are here."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megaseq.kernels.attention import AttentionMask, RelativeBias
from megaseq.layers.rotary import Rotation, RotationKey
from megaseq.layers.shared_rows import SharedMask, SharedRow
from megaseq.layers.tokens import Tokens

Mask = AttentionMask | SharedMask
"""Who sees whom, of the tokens of this rank or of rows that ranks share."""


@dataclass
class Sight:
    """What the self-attentions of one stack share for one batch."""

    segment_ids: Tensor | None
    """[B, T], 0 is padding; None: no padding, one segment a row."""
    positions: Tensor
    """[B or 1, T], 0-based, restarting in each segment."""
    causal: bool
    """Whether later keys are hidden."""
    bias: Tensor | RelativeBias | None = None
    """What the stack's position bias returned; of shared rows what `SharedRow.bias` did."""
    inner: Tokens | None = None
    """Tokens that the blocks of a layer have; None: the context's rows, whole."""
    stream: Tokens | None = None
    """Tokens that the residual stream between the blocks has: those of `inner`, or a tensor rank's share of them."""
    row: SharedRow | None = None
    """The whole rows, where ranks share their tokens."""
    masks: dict[int | None, Mask] = field(default_factory=dict)
    rotations: dict[RotationKey, Rotation] = field(default_factory=dict)

    def mask(self, window: int | None) -> Mask:
        """Returns the mask of layers with this `window`, made once.

        Places in the row stand for positions: a segment is in one piece and its positions count by one, so both give
        the same order and the same distances within it.
        """
        if window not in self.masks and self.row is not None:
            self.masks[window] = self.row.mask(causal=self.causal, window=window)
        elif window not in self.masks:
            self.masks[window] = AttentionMask(
                query_segment_ids=self.segment_ids,
                key_segment_ids=self.segment_ids,
                causal=self.causal,
                window=window,
            )
        return self.masks[window]


def inner_of(sight: Sight | None) -> Tokens | None:
    """Returns the tokens that blocks have; None: the context's rows, whole."""
    return None if sight is None else sight.inner


def stream_of(sight: Sight | None) -> Tokens | None:
    """Returns the tokens that the residual stream has; None: the context's rows, whole."""
    return None if sight is None else sight.stream
