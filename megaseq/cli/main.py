"""The `megaseq` command: finds the subcommand, runs it, and turns a user's mistake into one line and exit code 2.

Importing this module imports no torch: `megaseq --help` and shell completion answer at once, and each command
imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import megaseq
from megaseq.base.errors import MegaseqError

# Module of each command; the module's `register` adds its parser. Order is that of --help.
_COMMANDS = ("train", "eval", "decode", "params", "plan", "outer", "hosts", "checkpoint", "average", "bench")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="megaseq", description="Train, evaluate and decode sequence-to-sequence models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"megaseq {megaseq.__version__}")
    # What the DeepSpeed launcher puts before the command; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"megaseq.cli.{name}").register(subparsers)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; a mistake in it ends the process with a line on stderr and exit code 2."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(argv)
    arguments.argv = argv
    # argparse gives up on a list of positionals that options interrupt: NAME a=1 --run-dir R b=2.
    strays = [text for text in rest if text.startswith("-") or "=" not in text]
    if strays or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _show_log() -> None:
    """Shows on stderr what the package logs: warnings, and how long work on the data takes."""
    logger = logging.getLogger("megaseq")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]  # Not added: main() may be called again, with another stderr.
    logging.getLogger("megaseq.data").setLevel(logging.INFO)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of the process; returns the exit code.

    0: done, or stopped by a signal after saving. 2: a mistake of the user's, named in one line on stderr.
    """
    arguments = parse(argv)
    _show_log()
    try:
        return int(arguments.run(arguments) or 0)
    except MegaseqError as error:
        # The lines in which a run's params differ from those asked for, say.
        for line in getattr(error, "changes", ()):
            print(line, file=sys.stderr)
        print(f"megaseq: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
