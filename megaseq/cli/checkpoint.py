"""`megaseq checkpoint inspect|convert|average|diff`: looks into checkpoints, and makes others of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parsers."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="inspect, convert, average or compare checkpoints",
        description="Works on checkpoints.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    inspect = actions.add_parser(
        "inspect",
        help="verify and describe a checkpoint, or all of a run",
        description="Verifies every file against the manifest and describes what is in it. Exit code 1: one of a run's "
        "checkpoints is damaged.",
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

    _add_convert(actions)
    add_average(actions)
    _add_diff(actions)


def _add_convert(actions: _SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = actions.add_parser(
        "convert",
        help="write a checkpoint of any layout as one file or one process's checkpoint",
        description="Writes a checkpoint anew, as one process would have, whatever layout wrote it.",
        allow_abbrev=False,
    )
    convert.add_argument("path", metavar="PATH", help="checkpoint, or run directory, whose newest is meant")
    convert.add_argument("output", metavar="OUT", help="new checkpoint, or file that ends in .safetensors")
    convert.add_argument(
        "--weights",
        choices=("auto", "parameters", "ema", "all"),
        default="auto",
        help="parameters, their moving averages, the latter where there are any (auto), or all state, which "
        "training resumes from",
    )
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights; as they are if not given"
    )
    convert.set_defaults(run=run_convert)


def _add_diff(actions: _SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = actions.add_parser(
        "diff",
        help="compare two checkpoints",
        description="Compares names, shapes, types and values. Exit code 0: equal; 1: not; 2: cannot be compared.",
        allow_abbrev=False,
    )
    diff.add_argument("first", metavar="PATH", help="checkpoint, or run directory, whose newest is meant")
    diff.add_argument("second", metavar="OTHER", help="likewise")
    diff.add_argument("--tensors", metavar="PATTERN", help="compare only tensors whose names the pattern matches")
    diff.add_argument("--limit", type=int, default=20, metavar="N", help="print at most N lines of a kind (20)")
    diff.set_defaults(run=run_diff)


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
    """Prints the description; returns the exit code, 1 where a checkpoint is damaged."""
    from megaseq.checkpoint.inspect import look_into

    text, is_whole = look_into(arguments.path, pattern=arguments.tensors)
    print(text)
    return 0 if is_whole else 1


def run_convert(arguments: argparse.Namespace) -> int:
    """Writes the new checkpoint or file and prints its path; returns the exit code."""
    from megaseq.checkpoint.convert import convert

    print(convert(arguments.path, output=arguments.output, weights=arguments.weights, dtype=arguments.dtype))
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Prints what differs; returns the exit code."""
    from megaseq.checkpoint.difference import difference

    found = difference(arguments.first, arguments.second, pattern=arguments.tensors)
    print(found.text(limit=arguments.limit))
    return 1 if found else 0


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
