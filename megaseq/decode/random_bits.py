"""Random numbers that are a pure function of their keys, the same on every device and in every batch."""

from __future__ import annotations

import torch


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """A right shift that fills with zeros; torch's own copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap around as it wants."""
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def uniform(*keys: torch.Tensor | int) -> torch.Tensor:
    """Float64 numbers in [0, 1), one for each element of the broadcast integer `keys`; at least one is a tensor."""
    device = next(key.device for key in keys if isinstance(key, torch.Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        state = _mix(state * _FIRST + torch.as_tensor(key, dtype=torch.int64, device=device) + _GAMMA)
    return _shift(_mix(state + _GAMMA), 11).double() * 2.0**-53
