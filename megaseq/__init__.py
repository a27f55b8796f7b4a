"""megaseq: train, resume, decode and score sequence-to-sequence models from one typed Python class."""

from __future__ import annotations

__version__ = "0.1.0"
