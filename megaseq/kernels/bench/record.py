"""What runs on one card have found so far: a JSON file, written after each step, from which a later run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megaseq.kernels.bench.results import Machine, Result, machine
from megaseq.kernels.bench.timing import Ceiling, Measured, ceiling
from megaseq.kernels.checks import fail
from megaseq.kernels.triton_runtime import Config

Table = dict[str, dict[str, Config]]
"""By kernel and key: the best tile sizes."""


@dataclasses.dataclass
class OpRecord:
    """What is known of one op."""

    source: str
    """Hash of what it was found with."""
    proven: list[str] = dataclasses.field(default_factory=list)
    """Names of the cases that were right."""
    kernels: list[str] = dataclasses.field(default_factory=list)
    """Names of the kernels that these cases launched."""
    wrong: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By case: what was wrong when it last ran."""
    fatal: list[str] = dataclasses.field(default_factory=list)
    """Names of the wrong cases behind which nothing else could run; they are not tried again."""
    begun: dict[str, int] = dataclasses.field(default_factory=dict)
    """By case: how often a step with it was begun whose end was not seen, as its process was ended or crashed."""
    tuned: Table = dataclasses.field(default_factory=dict)
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    """By case."""


@dataclasses.dataclass
class Record:
    """The file of a card and the versions of what drives it."""

    path: Path
    machine: Machine
    ops: dict[str, OpRecord] = dataclasses.field(default_factory=dict)

    def of(self, op: str, *, source: str) -> OpRecord:
        """What is known of an op with this source; what was found with another one is forgotten."""
        if op not in self.ops or self.ops[op].source != source:
            self.ops[op] = OpRecord(source)
        return self.ops[op]

    def save(self) -> None:
        """Writes the file; one that is cut short leaves the old one."""
        content = {
            "machine": dataclasses.asdict(self.machine),
            "ops": {op: dataclasses.asdict(found) for op, found in sorted(self.ops.items())},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def forget(self, ops: Iterable[str]) -> None:
        """What is known of these ops."""
        for op in ops:
            self.ops.pop(op, None)

    def results(self, ops: Iterable[str]) -> list[Result]:
        """Of these ops, in this order."""
        return [result for op in ops if op in self.ops for result in self.ops[op].results.values()]


def of_machine(device: torch.device, *, folder: Path) -> Record:
    """The record of this machine in `folder`; a new one if there is none, or versions have changed."""
    here = machine(device)
    path = path_of(folder, card=here.card, versions=here.versions)
    if path.is_file():
        found = read(path)
        if found.machine.versions == here.versions:
            return found
    record = Record(path, dataclasses.replace(here, ceiling=ceiling(device)))
    record.save()
    return record


def path_of(folder: Path, *, card: str, versions: Mapping[str, str]) -> Path:
    """Where the record of a card with these versions is kept."""
    words = [card, *(f"{name}-{versions[name]}" for name in ("torch", "triton") if name in versions)]
    return folder / (re.sub(r"[^a-z0-9.+-]+", "_", "_".join(words).lower()) + ".json")


def read(path: Path) -> Record:
    """What `Record.save` wrote.

    Raises:
        KernelError: if the file holds something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept = content["machine"]
        machine = Machine(**{**kept, "ceiling": Ceiling(**kept["ceiling"])})
        return Record(path, machine, {op: _op_record(found) for op, found in content["ops"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(
            str(path), op="bench", expected="be as `megaseq bench kernels` wrote it",
            came=f"not readable as that ({type(error).__name__}: {error})", remedy="Remove it, or run that again",
        ) from error  # fmt: skip


def _op_record(content: Mapping[str, Any]) -> OpRecord:
    tuned = {
        kernel: {key: Config(**config) for key, config in rows.items()} for kernel, rows in content["tuned"].items()
    }
    results = {name: _result(result) for name, result in content["results"].items()}
    return OpRecord(**{**content, "tuned": tuned, "results": results})


def _result(content: Mapping[str, Any]) -> Result:
    peers = {name: peer if isinstance(peer, str) else Measured(**peer) for name, peer in content["peers"].items()}
    return Result(**{**content, "peers": peers})
