"""`megaseq eval PATH`: the loss of a checkpoint, or of every checkpoint of a run that trains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaseq.cli import overrides

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint, or follow a run",
        description="Prints the loss on the evaluation inputs. PATH is a checkpoint, or a run directory: its newest.",
        allow_abbrev=False,
    )
    add_job_arguments(parser)
    parser.set_defaults(run=run)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what eval and decode have in common."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint or a run directory")
    overrides.add_arguments(parser, data_dir="where inputs find their files, in place of what they were trained with")
    parser.add_argument("--watch", action="store_true", help="follow the run directory PATH: each checkpoint once")
    parser.add_argument("--poll-seconds", type=float, default=5.0, metavar="S", help="pause of --watch; default: 5")
    parser.add_argument(
        "--raw-weights", action="store_true", help="use the weights themselves where moving averages are kept"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    edit = overrides.editor(arguments)
    averaged = not arguments.raw_weights
    from megaseq.train import evaler
    from megaseq.train.jobs import print_figures

    if arguments.watch:
        evaler.watch(arguments.path, edit=edit, averaged=averaged, poll_seconds=arguments.poll_seconds)
    else:
        print_figures(evaler.evaluate_checkpoint(arguments.path, edit=edit, averaged=averaged))
    return 0
