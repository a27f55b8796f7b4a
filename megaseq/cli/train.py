"""`megaseq train NAME`: trains a registered experiment, or goes on with a run of it."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

from megaseq.cli import overrides

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from megaseq.train.experiment import Run


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "train",
        help="train an experiment, or go on with its run",
        description="Trains the experiment NAME. In a run directory with a checkpoint, goes on from there.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="registered experiment; `megaseq params list` shows them")
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what stands behind NAME."""
    overrides.add_arguments(parser)
    parser.add_argument("--run-dir", default="", metavar="DIR", help="where the run is kept; default: runs/NAME")
    parser.add_argument(
        "--allow-changed-params",
        action="store_true",
        help="go on with a run under params other than those it was begun with",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command, as one process among those that a launcher has started, or starts them; returns the code."""
    from megaseq.parallel.place import find_place

    place = find_place(os.environ)
    # Else torch tells of each lost connection in a page of C++ addresses; it reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if place.world_size == 1 or place.launcher == "slurm":
        params = _params(arguments)
        if place.world_size == 1 and params.train.local_sgd.workers and params.train.local_sgd.worker < 0:
            return _run_workers(params, arguments=arguments)
        from megaseq.parallel.spawn import batch_of, spawn

        devices = _open_devices(params)
        if batch := batch_of(params.parallel, place=place, devices=devices):
            _check(params, world_size=batch.count * batch.nodes, launched=batch.nodes > 1)
            if devices:
                print(
                    f"starts {batch.count} processes for the {devices} GPUs of this machine, as parallel.data is 0; "
                    "with parallel.data=1 there is one",
                    flush=True,
                )
            return spawn(arguments.argv, batch=batch)
        if place.world_size == 1:
            _train(params, arguments=arguments)
            return 0
    from megaseq.parallel.process import joined
    from megaseq.parallel.spawn import follow_parent

    if place.launcher == "megaseq":
        follow_parent()
    if place.rank:
        logging.getLogger("megaseq").setLevel(logging.ERROR)
        logging.getLogger("megaseq.data").setLevel(logging.ERROR)
    with joined(place):
        _train(_params(arguments), arguments=arguments)
    return 0


def _open_devices(params: Run.Params) -> int:
    """Returns the GPUs over which data ranks are to be spread; 0 where the params say how many processes there are."""
    if params.parallel.data or params.parallel.processes or params.train.local_sgd.worker >= 0:
        return 0
    from megaseq.train.device import num_devices

    devices = num_devices(params.train.device)
    return devices if devices > 1 else 0


def _check(params: Run.Params, *, world_size: int, launched: bool = False) -> None:
    """Refuses before any process starts what each of them would refuse."""
    from megaseq.train.parts import check_params
    from megaseq.train.ranks import layout_of

    check_params(params)
    layout_of(params, world_size=world_size, launched=launched)


def _run_workers(params: Run.Params, *, arguments: argparse.Namespace) -> int:
    from megaseq.parallel.spawn import num_processes
    from megaseq.train.local_sgd.launch import run_workers

    _check(params, world_size=num_processes(params.parallel))
    run_dir = arguments.run_dir or f"runs/{arguments.name}"
    return run_workers(arguments.argv, workers=params.train.local_sgd.workers, run_dir=run_dir)


def _params(arguments: argparse.Namespace) -> Run.Params:
    from megaseq.base import registry

    params: Run.Params = registry.params(arguments.name)
    overrides.apply(params, configs=arguments.config, overrides=arguments.overrides, data_dir=arguments.data_dir)
    return params


def _train(params: Run.Params, *, arguments: argparse.Namespace) -> None:
    from megaseq.train.trainer import Trainer

    trainer = Trainer(
        params,
        run_dir=arguments.run_dir or f"runs/{arguments.name}",
        allow_changed_params=arguments.allow_changed_params,
    )
    trainer.fit()
