"""megaseq: train, decode, quantise and serve sequence-to-sequence models from one package."""

from __future__ import annotations

__version__ = "0.1.0"
