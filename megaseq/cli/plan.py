"""`megaseq plan NAME`: which layout fits a model on so many devices, and which is fastest; without a device."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from megaseq.cli import overrides

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from megaseq.train.planning.hardware import Hardware

_FLAGS = {
    "memory_gib": "GiB of a device",
    "tflops": "10^12 operations a second of a device in bfloat16, dense",
    "efficiency": "share of them that matrix products reach",
    "memory_bandwidth": "10^9 bytes a second between a device and its memory",
    "link_bandwidth": "10^9 bytes a second that a device sends within its machine",
    "bandwidth": "10^9 bytes a second that a device sends to other machines",
    "host_link_bandwidth": "10^9 bytes a second between a device and its host",
    "host_memory_bandwidth": "10^9 bytes a second of the host's memory, a device's part",
    "disk_bandwidth": "10^9 bytes a second of the host's disks, a device's part",
    "latency_us": "microseconds of a message",
    "devices_per_machine": "devices of a machine",
}


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "plan",
        help="find the layout of an experiment on so many devices",
        description="Estimates memory and step time of every layout. Params of `parallel` that are set are kept.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="registered experiment; `megaseq params list` shows them")
    overrides.add_arguments(parser)
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="devices, one process each")
    for name, help_text in _FLAGS.items():
        kind = int if name == "devices_per_machine" else float
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="X", help=f"{help_text}; default: an H100's"
        )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="layouts to show")
    parser.add_argument(
        "--dry-run", action="store_true", help="build what one rank holds, without values, and check shapes and memory"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which rank --dry-run builds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from megaseq.base import registry
    from megaseq.train.parts import check_params
    from megaseq.train.planning.report import report
    from megaseq.train.planning.search import search
    from megaseq.train.planning.subject import Subject

    params = registry.params(arguments.name)
    overrides.apply(params, configs=arguments.config, overrides=arguments.overrides, data_dir=arguments.data_dir)
    check_params(params)
    hardware = _hardware(arguments)
    precision = "bf16" if params.train.precision == "auto" else params.train.precision
    subject = Subject(params, precision=precision)
    if arguments.dry_run:
        from megaseq.train.planning.dry_run import dry_run

        for line in dry_run(subject, hardware=hardware, rank=arguments.rank):
            print(line)
        return 0
    findings = search(subject, hardware=hardware)
    for line in report(subject, findings=findings, hardware=hardware, top=arguments.top):
        print(line)
    return 0 if findings.fitting else 1


def _hardware(arguments: argparse.Namespace) -> Hardware:
    from megaseq.train.planning.hardware import Hardware

    given: dict[str, Any] = {name: getattr(arguments, name) for name in _FLAGS}
    return dataclasses.replace(
        Hardware(devices=arguments.devices), **{name: value for name, value in given.items() if value is not None}
    )
