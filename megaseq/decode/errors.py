"""The error that decoding raises."""

from __future__ import annotations

from megaseq.base import errors


class DecodeError(errors.MegaseqError):
    """A model or an option that decoding cannot work with."""
