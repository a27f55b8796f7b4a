"""Divides a task over ranks: its parameters by their specs, then its layers learn what is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaseq.base.errors import AsText, ParamsError, must
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.placeholder import is_placeholder, placeholder
from megaseq.parallel.sharding import merged_rules, shard_spec
from megaseq.parallel.spec import ParameterSpec, Ranks, shard_of
from megaseq.parallel.tensor import TensorRanks


@runtime_checkable
class _Divisible(Protocol):
    """A layer, as far as it is divided."""

    divisible: bool

    def divide(self, ranks: Ranks) -> None: ...


def apply(task: nn.Module, *, mesh: Mesh, params: Parallel.Params, prefix: str = "task") -> None:
    """Leaves of each parameter of `task` what this rank holds, and tells its layers of the tensor ranks.

    Every parameter keeps its name and its spec, which describes the whole, and gets a `.shard`. To be called once, on
    any device, by all ranks; before `initialize`, or after it: values that are there are kept.

    Args:
        task: a module whose parameters were all made by `Layer.create_parameter`.
        mesh: where this process stands.
        params: of the run.
        prefix: what the path of `task` itself is.

    Raises:
        ParamsError: heads or hidden units that the ranks do not divide, a rule that does not exist, a layer that
            cannot be divided.
    """
    rules = merged_rules(params.rules)
    _check_sequence(params, rules=rules)
    for path, module in task.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            spec = getattr(parameter, "spec", None)
            if isinstance(spec, ParameterSpec):
                full = ".".join(part for part in (prefix, path, name) if part)
                _shard(parameter, path=full, spec=spec, rules=rules, mesh=mesh)
                _check_divisible(module, path=full, parameter=parameter)
    group = mesh.group("tensor")
    if group is None:
        return
    divided = frozenset(logical for logical, axis in rules.items() if axis == "tensor")
    ranks = TensorRanks(group=group, sequence=params.sequence, divided=divided)
    for module in task.modules():
        if isinstance(module, _Divisible):
            module.divide(ranks)


def _check_sequence(params: Parallel.Params, *, rules: Mapping[str, str]) -> None:
    if params.sequence and not (rules.get("heads") == rules.get("hidden") == "tensor"):
        raise must(
            "parallel.sequence",
            "be false where heads or hidden units are not divided over tensor ranks",
            True,
            "Remove parallel.rules.heads and parallel.rules.hidden",
        )


def _check_divisible(module: nn.Module, *, path: str, parameter: Tensor) -> None:
    shard = shard_of(parameter)
    if shard is not None and "tensor" in shard.axes and not getattr(module, "divisible", False):
        raise must(
            "parallel.tensor",
            f"be 1 for {type(module).__name__} ({path}), which cannot be divided over tensor ranks",
            AsText("more"),
            "Set parallel.tensor=1",
        )


def _shard(parameter: Tensor, *, path: str, spec: ParameterSpec, rules: Mapping[str, str], mesh: Mesh) -> None:
    """Cuts one parameter down to what is here."""
    _check_sizes(path, spec=spec, rules=rules, mesh=mesh)
    shard = shard_spec(spec, rules=rules, mesh=mesh)
    if shard is None:
        return
    if is_placeholder(parameter):
        parameter.data = placeholder(shard.local_shape, dtype=parameter.dtype)
    else:
        with torch.no_grad():
            local = parameter.new_empty(shard.local_shape)
            for box in shard.boxes:
                box.of_local(local).copy_(box.of_global(parameter))
            parameter.data = local
    parameter.shard = shard  # type: ignore[attr-defined]


def _check_sizes(path: str, *, spec: ParameterSpec, rules: Mapping[str, str], mesh: Mesh) -> None:
    """Refuses heads, hidden units and experts that the ranks cannot share; a vocabulary may be divided unevenly."""
    for dim, logical in enumerate(spec.axes):
        axis = rules.get(logical or "", "")
        if not axis or mesh.size(axis) == 1:
            continue
        ranks = mesh.size(axis)
        if logical == "vocab":
            if spec.shape[dim] < ranks:
                rule = f"be at most the {spec.shape[dim]} tokens of {path}"
                raise must(f"parallel.{axis}", rule, ranks, "Use fewer tensor ranks")
            continue
        lengths = spec.parts if spec.parts and dim == 0 else (spec.shape[dim],)
        for index, length in enumerate(lengths):
            count = length // spec.granule if logical == "heads" else length
            # Of fused projections the first is the queries', which are never shared.
            shareable = logical == "heads" and spec.granule > 1 and (index > 0 or _only_keys(spec))
            if count % ranks == 0 or (shareable and ranks % count == 0):
                continue
            allowed = [n for n in range(1, count + 1) if count % n == 0]
            names = {"heads": "heads", "hidden": "hidden units", "expert": "experts"}
            what = "key heads" if shareable else names.get(logical or "", str(logical))
            rule = f"divide the {count} {what} of {path}" + (" or be a multiple of them" if shareable else "")
            raise must(f"parallel.{axis}", rule, ranks, f"Choose one of {allowed}", kind=ParamsError)


def _only_keys(spec: ParameterSpec) -> bool:
    """Whether the fused parts are keys and values, without queries."""
    return len(spec.parts) == 2


def whole_tensor(local: Tensor, *, parameter: Tensor, mesh: Mesh) -> Tensor:
    """Returns the whole of a tensor that is divided as `parameter` is: itself, its gradient or a moment of it.

    All ranks of the parameter's axes call it at the same time.

    Args:
        local: what is here, shaped as this rank's `parameter`.
        parameter: with `.spec` and, where divided, `.shard`.
        mesh: where this process stands.
    """
    shard = shard_of(parameter)
    if shard is None:
        return local.detach()
    spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
    whole = torch.zeros(spec.shape, dtype=local.dtype, device=local.device)
    sharers = _first_sharers(parameter, mesh=mesh)
    for box, first in zip(shard.boxes, sharers, strict=True):
        if first:
            box.of_global(whole).copy_(box.of_local(local.detach()))
    for axis in shard.axes:
        dist.all_reduce(whole, group=mesh.group(axis))
    return whole


def _first_sharers(parameter: Tensor, *, mesh: Mesh) -> tuple[bool, ...]:
    """Tells for each block of a parameter whether this rank is the first that holds it."""
    shard, spec = shard_of(parameter), getattr(parameter, "spec", None)
    if shard is None or not isinstance(spec, ParameterSpec):
        return ()
    first = []
    for part, box, shared in zip(spec.parts or (spec.shape[0],), shard.boxes, shard.shared, strict=True):
        ranks, index = mesh.size("tensor"), mesh.index("tensor")
        first.append(not shared or index % (ranks // max(1, part // box.size[0])) == 0)
    return tuple(first)


def whole_parameters(module: nn.Module, *, mesh: Mesh) -> dict[str, Tensor]:
    """Returns all parameters of `module` by name, whole; to be called by all tensor and expert ranks together."""
    return {
        name: whole_tensor(parameter, parameter=parameter, mesh=mesh) for name, parameter in module.named_parameters()
    }
