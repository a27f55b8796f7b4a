"""How a run begins on its ranks: devices, agreement on code and params, the mesh; and what is told of it."""

from __future__ import annotations

import itertools

import torch

from megaseq.base.errors import AsText, must
from megaseq.parallel.layout import Layout, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.place import Place
from megaseq.parallel.process import Team, code_hash, text_hash
from megaseq.parallel.refusals import check_layout
from megaseq.train.device import device_name, resolve_device
from megaseq.train.experiment import Run
from megaseq.train.model_facts import model_facts

_SHOWN_RANKS = 64
"""Of more, the placement shows hosts and not ranks."""


def device_of(asked: str, *, place: Place) -> torch.device:
    """Returns the device of one process: on a machine with GPUs each has its own.

    Args:
        asked: `train.device`.
        place: of the process.

    Raises:
        ParamsError: a GPU is asked for, and there is none, or more processes than GPUs.
    """
    device = resolve_device(asked)
    if device.type == "cpu" or place.world_size == 1:
        return device
    count = torch.cuda.device_count()
    # Slurm may show each task its own GPU only.
    index = 0 if count == 1 and place.launcher == "slurm" else place.local_rank
    if index >= count:
        raise must(
            "parallel",
            "have a GPU for each process of a machine",
            AsText(f"{place.local_size} processes for {count} GPU{'s' if count != 1 else ''}"),
            "Start fewer processes, or set train.device=cpu",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def layout_of(params: Run.Params, *, world_size: int, launched: bool = False) -> Layout:
    """Returns the layout of a run on so many processes, which works; needs no process but this one.

    Args:
        params: of the run.
        world_size: processes.
        launched: whether a launcher says how many there are; else `parallel` does, and so does what would work.

    Raises:
        ParamsError: the layout does not fit the processes or the model.
    """
    layout = resolve_layout(params.parallel, world_size=world_size)
    check_layout(params.parallel, layout=layout, facts=model_facts(params), launched=launched)
    return layout


def begin(params: Run.Params, *, team: Team) -> tuple[torch.device, Mesh]:
    """Joins the ranks; all call it at the same time. Returns this one's device and the mesh.

    Raises:
        ParamsError: the layout does not fit the processes or the model, or ranks differ in code or params.
    """
    device = device_of(params.train.device, place=team.place)
    team.open(device=device, timeout_seconds=params.parallel.timeout_seconds)
    team.check_same({"code": code_hash(), "params": text_hash(params.to_text())})
    layout = layout_of(params, world_size=team.world_size, launched=team.place.launcher not in ("none", "megaseq"))
    return device, Mesh(layout, rank=team.rank, timeout_seconds=params.parallel.timeout_seconds * 1.25 + 10)


def placement(mesh: Mesh, *, team: Team, device: torch.device, task: torch.nn.Module) -> list[str]:
    """Returns lines that say which rank is where and has what; all ranks call it. One process needs none.

    Args:
        mesh: of the run.
        team: of the run.
        device: of this process.
        task: what this process has of the model.
    """
    if team.world_size == 1:
        return []
    hosts, devices = team.hosts(), [str(name) for name in team.gather(device_name(device))]
    # Under ZeRO stage 3 a parameter has nothing but `ds_tensor`, this rank's share, between its uses.
    held = team.gather(sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in task.parameters()))
    kinds = ", ".join(dict.fromkeys(name.split(" ")[-1] if "(" not in name else name for name in devices))
    machines = len(set(hosts))
    lines = [
        f"{team.world_size} processes on {machines} machine{'s' if machines > 1 else ''} ({kinds}), started by "
        f"{team.place.launcher}: {mesh.layout}"
    ]
    if team.world_size > _SHOWN_RANKS:
        for host, ranks in itertools.groupby(range(team.world_size), key=lambda rank: hosts[rank]):
            own = list(ranks)
            lines.append(f"  {host}: ranks {own[0]} to {own[-1]}")
        return lines
    for rank, (host, name) in enumerate(zip(hosts, devices, strict=True)):
        place = mesh.layout.coordinates(rank)
        named = [f"{axis} {place[axis]}" for axis in ("data", "pipe", "context", "tensor") if mesh.size(axis) > 1]
        if mesh.layout.expert > 1:
            named.append(f"expert {place['expert']}")
        lines.append(f"  rank {rank} on {host}, {name}: {', '.join(named)}, {held[rank] / 1e6:.1f} M parameters")
    return lines
