"""`megaseq checkpoint inspect|average`: looks into checkpoints, and averages them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parsers."""
    parser = subparsers.add_parser(
        "checkpoint", help="inspect or average checkpoints", description="Works on checkpoints.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    inspect = actions.add_parser(
        "inspect",
        help="verify and describe a checkpoint, or all of a run",
        description="Verifies every file against the manifest and describes what is in it.",
        allow_abbrev=False,
    )
    inspect.add_argument("path", metavar="PATH", help="checkpoint, run directory, or its folder of checkpoints")
    inspect.add_argument(
        "--tensors",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list tensors whose names the pattern matches; alone: all",
    )
    inspect.set_defaults(run=run_inspect)

    add_average(actions)


def add_average(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of `average`, which is also a command of its own."""
    average = subparsers.add_parser(
        "average",
        help="average the parameters of several checkpoints",
        description="Writes the mean of the parameters of several checkpoints, as a checkpoint or a .safetensors file.",
        allow_abbrev=False,
    )
    average.add_argument("paths", nargs="+", metavar="PATH", help="checkpoints; or one run directory, with --last")
    average.add_argument("--last", type=int, metavar="N", help="average the N newest of the run directory")
    average.add_argument(
        "--output", required=True, metavar="OUT", help="new checkpoint, or file that ends in .safetensors"
    )
    average.add_argument(
        "--weights",
        choices=("auto", "parameters", "ema"),
        default="auto",
        help="parameters, their moving averages, or the latter where there are any (auto)",
    )
    average.set_defaults(run=run_average)


def run_inspect(arguments: argparse.Namespace) -> int:
    """Prints the description; returns the exit code."""
    from megaseq.checkpoint.inspect import inspect

    print(inspect(arguments.path, pattern=arguments.tensors))
    return 0


def run_average(arguments: argparse.Namespace) -> int:
    """Writes the average and prints what it is of; returns the exit code."""
    from megaseq.base.errors import CheckpointError
    from megaseq.checkpoint.average import newest, write_average

    paths = arguments.paths
    if arguments.last is not None:
        if len(paths) != 1:
            raise CheckpointError(
                f"megaseq checkpoint average: must get one run directory with --last, but got {len(paths)} "
                f"paths. Give one."
            )
        paths = newest(paths[0], count=arguments.last)
    output = write_average(paths, output=arguments.output, weights=arguments.weights)
    print("\n".join([f"{output}: the average of", *(f"  {path}" for path in paths)]))
    return 0
