"""`megaseq decode PATH`: decodes and scores the evaluation inputs, or translates the lines of a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megaseq.base.errors import AsText, DataError, must
from megaseq.cli import overrides
from megaseq.cli.eval import add_job_arguments

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "decode",
        help="decode with a checkpoint, or follow a run",
        description="Decodes the evaluation inputs and scores them, or, with --input, the lines of a text to stdout. "
        "PATH is a checkpoint or a run directory (its newest one). The search is that of the experiment; change it by "
        "task.search.NAME=VALUE.",
        allow_abbrev=False,
    )
    add_job_arguments(parser)
    parser.add_argument("--input", metavar="FILE", help="decode the lines of FILE, - for stdin, instead")
    parser.add_argument("--output", metavar="FILE", help="with --input: where to write; default: stdout")
    parser.add_argument(
        "--jsonl", action="store_true", help="with --input: write all hypotheses with scores, one JSON object a line"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.input is not None:
        if arguments.watch:
            raise must("--watch", "stand without --input", AsText("with it"), "Drop one of the two")
        return _decode_input(arguments)
    edit = overrides.editor(arguments)
    averaged = not arguments.raw_weights
    from megaseq.train import decoder
    from megaseq.train.tracking.progress import SamplesPrinter

    if arguments.watch:
        decoder.watch(arguments.path, report=print, edit=edit, averaged=averaged, poll_seconds=arguments.poll_seconds)
    else:
        decoder.decode_checkpoint(
            arguments.path, report=print, callback=SamplesPrinter(sys.stdout), edit=edit, averaged=averaged
        )
    return 0


def _decode_input(arguments: argparse.Namespace) -> int:
    from megaseq.train.decoder import decode_lines
    from megaseq.train.decoding import best_text, nbest_lines

    interactive = arguments.input == "-" and sys.stdin.isatty()
    decoded = decode_lines(
        arguments.path,
        lines=_lines(arguments.input),
        lines_at_once=1 if interactive else 1024,
        edit=overrides.editor(arguments),
        averaged=not arguments.raw_weights,
    )
    output = _open_output(arguments.output) if arguments.output else sys.stdout
    try:
        for source, hypotheses in decoded:
            if arguments.jsonl:
                output.write(nbest_lines([source], hypotheses=[hypotheses]))
            else:
                output.write(best_text(hypotheses).replace("\n", " ") + "\n")
            if interactive:
                output.flush()
    finally:
        if output is not sys.stdout:
            output.close()
    return 0


def _open_output(name: str) -> IO[str]:
    try:
        return Path(name).open("w", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        value = AsText(f"not ({reason})")
        raise must(f"--output {name}", "be a file that can be written", value, "Choose another") from None


def _lines(name: str) -> Iterator[str]:
    """Yields the lines of a file, or of stdin for `-`.

    Raises:
        DataError: the file is missing, or a line is not UTF-8.
    """
    try:
        # Not text mode: its universal newlines would split a line at a lone carriage return.
        stream = sys.stdin.buffer if name == "-" else Path(name).open("rb")  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or str(error)
        value = AsText(f"not ({reason})")
        raise must(f"--input {name}", "be a readable file", value, "Check the path", kind=DataError) from None
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{'stdin' if name == '-' else name}:{number}"
                raise must(where, "be UTF-8", AsText(str(error)), "Convert the file", kind=DataError) from None
