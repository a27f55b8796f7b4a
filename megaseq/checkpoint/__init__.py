"""Saving, restoring, averaging and inspecting the state of a run; nothing is ever unpickled."""

from __future__ import annotations

from megaseq.checkpoint.average import average
from megaseq.checkpoint.checkpointer import Checkpointer
from megaseq.checkpoint.directory import find_checkpoint, list_steps
from megaseq.checkpoint.manifest import DamagedError
from megaseq.checkpoint.reading import OpenCheckpoint, Restored, load_checkpoint
from megaseq.checkpoint.safetensors_file import export_safetensors

__all__ = [
    "Checkpointer",
    "DamagedError",
    "OpenCheckpoint",
    "Restored",
    "average",
    "export_safetensors",
    "find_checkpoint",
    "list_steps",
    "load_checkpoint",
]
