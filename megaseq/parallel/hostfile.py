"""Hostfiles of the DeepSpeed launcher: reading them, and finding what would stop a start, before it does."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megaseq.base.errors import AsText, ParamsError, must, sentence

_PROBE = "nvidia-smi -L 2>/dev/null | grep -c ^GPU; getconf _NPROCESSORS_ONLN"
_REACH_SECONDS = 10


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """Processes to start there."""
    line: int


@dataclass(frozen=True)
class Capacity:
    """What a host says of itself."""

    gpus: int
    cores: int


def read_hostfile(path: Path) -> list[Host]:
    """Returns the hosts of a file with lines `NAME slots=N`.

    Raises:
        ParamsError: it is missing, empty or has bad lines or a host twice; one line for each.
    """
    if not path.is_file():
        raise must(str(path), "be a hostfile", AsText("missing"), "Copy launch/hostfile.example")
    hosts: dict[str, Host] = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) == 0:
            problems.append(sentence(f"{path}:{number}", "look like `worker-0 slots=8`", text, "Correct the line"))
        elif match[1] in hosts:
            rule = f"name each host once, and {match[1]} is on line {hosts[match[1]].line}"
            problems.append(sentence(f"{path}:{number}", rule, text, "Remove one of the lines"))
        else:
            hosts[match[1]] = Host(name=match[1], slots=int(match[2]), line=number)
    if not hosts and not problems:
        problems.append(sentence(str(path), "name at least one host", AsText("empty"), "Add `worker-0 slots=8`"))
    if problems:
        raise ParamsError("\n".join(problems))
    return list(hosts.values())


def probe(host: Host) -> Capacity | None:
    """Asks a host, over ssh unless it is this one, what it has; None where it does not answer."""
    command = ["sh", "-c", _PROBE]
    if host.name not in ("localhost", "127.0.0.1", socket.gethostname()):
        if shutil.which("ssh") is None:
            return None
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_REACH_SECONDS}"]
        command = ["ssh", *options, host.name, _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * _REACH_SECONDS, check=False)
        gpus, cores = (int(word) for word in done.stdout.split()[-2:])
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return Capacity(gpus=gpus, cores=cores)


def check_hosts(
    hosts: Sequence[Host], *, path: Path, ask: Callable[[Host], Capacity | None] = probe
) -> dict[str, Capacity]:
    """Asks all hosts at once; returns what each has.

    Args:
        hosts: of the file.
        path: of the file, for messages.
        ask: asks one host.

    Raises:
        ParamsError: hosts that do not answer, or have more slots than GPUs (without any: than cores); one line each.
    """
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as executor:
        answers = list(executor.map(ask, hosts))
    problems: list[str] = []
    found: dict[str, Capacity] = {}
    for host, capacity in zip(hosts, answers, strict=True):
        where = f"{path}:{host.line}"
        if capacity is None:
            rule = "name a host that ssh reaches without a password"
            remedy = "Check the name and its sshd, install your key there, or remove the line"
            problems.append(sentence(where, rule, host.name, remedy))
            continue
        found[host.name] = capacity
        most, kind = (capacity.gpus, "GPUs") if capacity.gpus else (capacity.cores, "cores")
        if host.slots > most:
            rule = f"have at most the {most} {kind} of {host.name} as slots"
            problems.append(sentence(where, rule, host.slots, f"Write slots={most}"))
    if problems:
        raise ParamsError("\n".join(problems))
    return found
