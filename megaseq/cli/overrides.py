"""Params as the command line gives them: an experiment, YAML overlays, `path=value` and the data directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaseq.base.errors import AsText, must

if TYPE_CHECKING:
    from megaseq.base import Params


def add_arguments(
    parser: argparse.ArgumentParser, *, data_dir: str = "where inputs without a data_dir find their files"
) -> None:
    """Adds -c, --data-dir, whose help is `data_dir`, and the positional path=value to `parser`."""
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE.yaml", help="YAML overlay; later ones win"
    )
    parser.add_argument("--data-dir", default="", metavar="DIR", help=data_dir)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="path=value", help="params to set, e.g. train.max_steps=1000"
    )


def apply(params: Params, *, configs: Sequence[str], overrides: Sequence[str], data_dir: str = "") -> Params:
    """Applies overlays, then `path=value`, then the data directory, to `params` and returns them.

    Raises:
        ParamsError: a file that does not exist, an unknown path, a value of the wrong type.
    """
    from megaseq.base import apply_overrides

    for name in configs:
        path = Path(name)
        if not path.is_file():
            raise must(f"-c {name}", "be a YAML file", AsText("missing"), "Check the path")
        params.apply_yaml(path.read_text(encoding="utf-8"), filename=name)
    apply_overrides(params, assignments=overrides)
    if data_dir:
        set_data_dir(params, data_dir)
    return params


def editor(arguments: argparse.Namespace) -> Callable[[Params], object]:
    """Returns what applies the overrides of `arguments` to the params of a checkpoint.

    There the data directory replaces the one that the run was trained with, which may be of another machine.

    Raises:
        ParamsError: a layout is asked for.
    """
    if asked := [text for text in arguments.overrides if text.startswith("parallel.")]:
        remedy = "Leave it out: one process reads a checkpoint of any layout"
        raise must(asked[0].partition("=")[0], "not be set for evaluation and decoding", AsText("given"), remedy)

    def edit(params: Params) -> None:
        if arguments.data_dir:
            set_data_dir(params, arguments.data_dir, only_empty=False)
        apply(params, configs=arguments.config, overrides=arguments.overrides)

    return edit


def set_data_dir(params: Params, data_dir: str, *, only_empty: bool = True) -> None:
    """Sets every `data_dir` field in the tree, or every empty one.

    Raises:
        ParamsError: `data_dir` is no directory.
    """
    if not Path(data_dir).is_dir():
        raise must("--data-dir", "be a directory", data_dir, "Check the path")
    # Checkpoints keep it, and are read from other directories than this one.
    data_dir = str(Path(data_dir).resolve())
    for path, value in list(params.leaves()):
        if path.rpartition(".")[2] == "data_dir" and (value == "" or not only_empty):
            params.set(path, data_dir, origin="--data-dir")
