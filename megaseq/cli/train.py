"""`megaseq train NAME`: trains a registered experiment, or goes on with a run of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaseq.cli import overrides

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "train",
        help="train an experiment, or go on with its run",
        description="Trains the experiment NAME. In a run directory with a checkpoint, goes on from there.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="registered experiment; `megaseq params list` shows them")
    overrides.add_arguments(parser)
    parser.add_argument("--run-dir", default="", metavar="DIR", help="where the run is kept; default: runs/NAME")
    parser.add_argument(
        "--allow-changed-params",
        action="store_true",
        help="go on with a run under params other than those it was begun with",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from megaseq.base import registry

    params = registry.params(arguments.name)
    overrides.apply(params, configs=arguments.config, overrides=arguments.overrides, data_dir=arguments.data_dir)
    from megaseq.train.trainer import Trainer

    trainer = Trainer(
        params,
        run_dir=arguments.run_dir or f"runs/{arguments.name}",
        allow_changed_params=arguments.allow_changed_params,
    )
    trainer.fit()
    return 0
