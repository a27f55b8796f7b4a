"""`megaseq outer`: the server at which the workers of local SGD and DiLoCo meet."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "outer",
        help="serve the workers of local SGD",
        description="Serves the workers of one run (train.local_sgd.address) until all of them have finished.",
    )
    parser.add_argument("--listen", default=":29600", metavar="HOST:PORT", help="default :29600, on all interfaces")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from megaseq.train.local_sgd.server import serve

    serve(arguments.listen)
    return 0
