"""Which of a run's processes this one is, read from what its launcher has put in the environment; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megaseq.base.errors import AsText, ParamsError, must

Launcher = Literal["none", "megaseq", "torchrun", "deepspeed", "slurm", "mpi", "environment"]

SPAWNED = "MEGASEQ_SPAWNED"
"""Set for processes that `megaseq train` has started; `parent` where the parent keeps the meeting point."""

_PORTS = (15_000, 30_000)
"""Ports that a Slurm job chooses among, by its number: below those that Linux gives to connections."""


@dataclass(frozen=True)
class Place:
    """One process among those of a run, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1
    launcher: Launcher = "none"
    address: str = "127.0.0.1"
    """Host at which the processes meet."""
    port: int = 0
    keeps_store: bool = True
    """Whether rank 0 keeps the store at which the processes meet; else the launcher does."""
    attempt: str = "0"
    """Differs between the starts of one job by the same launcher."""


def find_place(environment: Mapping[str, str]) -> Place:
    """Returns the place that torchrun, the DeepSpeed launcher, Slurm, MPI or `megaseq train` itself gave this process.

    Raises:
        ParamsError: the launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = _of_launcher(environment)
    elif _number(environment, "SLURM_STEP_NUM_TASKS", default=1) > 1 and "SLURM_PROCID" in environment:
        place = _of_slurm(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment or "PMI_RANK" in environment:
        place = _of_mpi(environment)
    else:
        return Place()
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_size):
        raise must(
            place.launcher,
            "give each process a rank below the number of processes",
            AsText(
                f"rank {place.rank} of {place.world_size}, on this machine {place.local_rank} of {place.local_size}"
            ),
            "Check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        )
    return place


def _of_launcher(environment: Mapping[str, str]) -> Place:
    launcher: Launcher = "environment"
    if SPAWNED in environment:
        launcher = "megaseq"
    elif "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environment:
        launcher = "deepspeed"
    world_size = _number(environment, "WORLD_SIZE")
    # A launcher that gives no local rank has one process a machine.
    local_rank = _number(environment, "LOCAL_RANK", default=0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", default=_number(environment, "LOCAL_SIZE", default=0))
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or environment.get(SPAWNED) == "parent"
    return Place(
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size or max(1, local_rank + 1),
        launcher=launcher,
        address=_text(environment, "MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT"),
        keeps_store=not agent,
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _of_slurm(environment: Mapping[str, str]) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = _number(environment, "SLURM_JOB_ID", default=0)
    low, high = _PORTS
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_rank, node = (_number(environment, name, default=0) for name in ("SLURM_LOCALID", "SLURM_NODEID"))
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=local_rank,
        local_size=counts[node] if node < len(counts) else local_rank + 1,
        launcher="slurm",
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        port=_number(environment, "MASTER_PORT", default=low + job % (high - low)),
        attempt=environment.get("SLURM_RESTART_COUNT", "0"),
    )


def _of_mpi(environment: Mapping[str, str]) -> Place:
    open_mpi = "OMPI_COMM_WORLD_RANK" in environment
    prefix = "OMPI_COMM_WORLD_" if open_mpi else "PMI_"
    local = "OMPI_COMM_WORLD_LOCAL_" if open_mpi else "MPI_LOCAL"
    local_rank = _number(environment, f"{local}RANK" if open_mpi else f"{local}RANKID", default=0)
    world_size = _number(environment, f"{prefix}SIZE")
    if world_size == 1:
        return Place(launcher="mpi")
    return Place(
        rank=_number(environment, f"{prefix}RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_size=_number(environment, f"{local}SIZE" if open_mpi else f"{local}NRANKS", default=local_rank + 1),
        launcher="mpi",
        address=_text(environment, "MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT", default=29_500),
    )


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise must(name, "be set by the launcher", AsText("missing"), "Export it, or start with torchrun")
    return value


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d+", text):
        raise must(name, "be a whole number, set by the launcher", text or AsText("missing"), "Correct the launcher")
    return int(text)


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's `2(x3),1` to [2, 2, 2, 1]; an empty text gives an empty list."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise must("SLURM_STEP_TASKS_PER_NODE", "look like 2(x3),1", text, "Check the Slurm environment")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Returns the first host of a Slurm node list: `gpu07` of `gpu[07-09,12],login1`.

    Raises:
        ParamsError: the list is empty or has another form.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?(?:,|$)", nodes)
    if match is None:
        raise must(
            "SLURM_JOB_NODELIST",
            "name the hosts of the job",
            nodes or AsText("missing"),
            "Set MASTER_ADDR to the first one",
            kind=ParamsError,
        )
    return f"{match[1]}{match[2] or ''}{match[3] or ''}"
