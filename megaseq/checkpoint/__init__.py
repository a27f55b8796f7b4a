"""Saving, restoring, averaging and inspecting the state of a run; nothing is ever unpickled."""

from __future__ import annotations

from megaseq.checkpoint.average import average, newest, write_average
from megaseq.checkpoint.checkpointer import Checkpointer
from megaseq.checkpoint.convert import convert
from megaseq.checkpoint.difference import difference
from megaseq.checkpoint.directory import find_checkpoint, list_steps
from megaseq.checkpoint.inspect import inspect
from megaseq.checkpoint.manifest import DamagedError
from megaseq.checkpoint.piece import Piece, fragment_pieces, shard_pieces, whole_piece
from megaseq.checkpoint.ranks import Ranks
from megaseq.checkpoint.reading import OpenCheckpoint, Restored, load_checkpoint
from megaseq.checkpoint.safetensors_file import export_safetensors
from megaseq.checkpoint.warm_start import WarmStart, WarmStartReport, WarmStartRule, init_from

__all__ = [
    "Checkpointer",
    "DamagedError",
    "OpenCheckpoint",
    "Piece",
    "Ranks",
    "Restored",
    "WarmStart",
    "WarmStartReport",
    "WarmStartRule",
    "average",
    "convert",
    "difference",
    "export_safetensors",
    "find_checkpoint",
    "fragment_pieces",
    "init_from",
    "inspect",
    "list_steps",
    "load_checkpoint",
    "newest",
    "shard_pieces",
    "whole_piece",
    "write_average",
]
