"""`megaseq average`: the short name of `megaseq checkpoint average`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaseq.cli.checkpoint import add_average

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    add_average(subparsers)
