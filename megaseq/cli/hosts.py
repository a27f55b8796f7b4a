"""`megaseq hosts HOSTFILE [NAME]`: checks a hostfile, and a run on it, before the DeepSpeed launcher reads it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megaseq.cli import overrides, train

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "hosts",
        help="check a hostfile: form, duplicates, reachable hosts, slots",
        description="Checks the hostfile HOSTFILE and, with NAME, whether training it on these slots is refused. "
        "Behind NAME stand the arguments of `megaseq train`.",
        allow_abbrev=False,
    )
    parser.add_argument("hostfile", metavar="HOSTFILE", help="lines of `HOST slots=N`")
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="registered experiment")
    train.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from megaseq.parallel.hostfile import check_hosts, read_hostfile

    path = Path(arguments.hostfile)
    hosts = read_hostfile(path)
    found = check_hosts(hosts, path=path)
    for host in hosts:
        capacity = found[host.name]
        print(f"{host.name}: {host.slots} processes, {capacity.gpus} GPUs, {capacity.cores} cores")
    if arguments.name:
        from megaseq.base import registry
        from megaseq.train.parts import check_params
        from megaseq.train.ranks import layout_of

        params = registry.params(arguments.name)
        overrides.apply(params, configs=arguments.config, overrides=arguments.overrides, data_dir=arguments.data_dir)
        check_params(params)
        layout = layout_of(params, world_size=sum(host.slots for host in hosts), launched=True)
        print(f"{layout.world_size} processes: {layout}")
    return 0
