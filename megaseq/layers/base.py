"""Layer, the base of every module; first values of parameters and dropout masks are functions of their paths."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megaseq.base import FROM_PARENT, Configurable
from megaseq.base.errors import ParamsError, must
from megaseq.kernels.dropout import dropout, dropout_add
from megaseq.layers.auxiliary import AuxiliaryLoss
from megaseq.layers.initializers import Initializer
from megaseq.layers.tokens import Tokens, starts
from megaseq.parallel.spec import AXES, Axis, ParameterSpec, Ranks, shard_of

AnyParams = TypeVar("AnyParams", bound=Configurable.Params)


@dataclass
class StepContext:
    """Where training stands; one object shared by all layers of a model, moved on by the engine."""

    seed: int = 0
    """The run's seed."""
    step: int = 0
    """Optimiser steps done."""
    row_start: int = 0
    """Number, in the step's global batch, of the first row that the forward pass has."""
    row_stride: int = 1
    """From one row that the forward pass has to the next, in the numbers of the global batch: data-parallel ranks."""
    auxiliary: list[AuxiliaryLoss] | None = None
    """Layers put here what they add to the loss of the forward pass that is going on; None: nobody wants to know."""


_WITHOUT_MEMORY = contextvars.ContextVar("megaseq_parameters_without_memory", default=False)


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Within the context new parameters have a shape and one element of memory.

    They can be given memory on any device later, by setting their `data`; before, they are not to be read or written.
    """
    token = _WITHOUT_MEMORY.set(True)
    try:
        yield
    finally:
        _WITHOUT_MEMORY.reset(token)


def _uninitialized(shape: tuple[int, ...]) -> Tensor:
    if _WITHOUT_MEMORY.get():
        return torch.empty((), dtype=torch.float32).expand(shape)
    return torch.empty(shape, dtype=torch.float32)


def stable_hash(text: str) -> int:
    """Returns 63 bits that depend on `text` alone: the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Layer(nn.Module, Configurable):
    """A torch module that is built from its Params and whose parameters carry a `ParameterSpec` as `.spec`."""

    class Params(Configurable.Params):
        pass

    divisible = False
    """Whether the layer works with parameters of its own that tensor ranks have divided."""

    def __init__(self, p: Params) -> None:
        nn.Module.__init__(self)
        Configurable.__init__(self, p)
        self.path = ""
        self.path_hash = 0
        self.context = StepContext()
        self.ranks: Ranks | None = None

    def create_parameter(
        self,
        name: str,
        *,
        shape: tuple[int, ...],
        axes: tuple[Axis, ...],
        init: Initializer,
        parts: tuple[int, ...] = (),
        part_inits: tuple[Initializer, ...] = (),
        granule: int = 1,
    ) -> nn.Parameter:
        """Registers and returns an uninitialised float32 parameter; `initialize` gives it its values.

        Args:
            name: attribute of this layer, the last part of the parameter's path.
            shape: global shape.
            axes: logical axis of each dimension, None for one that is never sharded.
            init: first values.
            parts: sizes along dimension 0 of fused projections, see `ParameterSpec`.
            part_inits: first values of each part, where they differ.
            granule: elements of one head, in the dimension of `heads`.

        Raises:
            ParamsError: axes that do not fit the shape or are unknown, parts that do not add up.
        """
        if len(axes) != len(shape) or not set(axes) <= AXES | {None}:
            raise must(
                name,
                f"have one logical axis of {sorted(AXES)} or None a dimension",
                f"{axes} for {shape}",
                "Correct create_parameter's axes",
                kind=ParamsError,
            )
        if parts and sum(parts) != shape[0]:
            raise must(name, f"have parts that add up to {shape[0]}", parts, "Correct the parts", kind=ParamsError)
        if part_inits and len(part_inits) != len(parts):
            raise must(name, f"have an initialiser for each of {len(parts)} parts", len(part_inits), "Give one each")
        parameter = nn.Parameter(_uninitialized(shape))
        spec = ParameterSpec(shape=shape, axes=axes, init=init, parts=parts, part_inits=part_inits, granule=granule)
        parameter.spec = spec  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)
        return parameter

    def divide(self, ranks: Ranks) -> None:
        """Learns that tensor ranks share this model: local sizes and exchanges are set here.

        Called once by `parallel.apply`, from the model down to its parts; parameters have their `.shard` then.
        """
        self.ranks = ranks

    def whole(self, parameter: Tensor, *, tokens: Tokens | None) -> Tensor:
        """Returns a parameter that is whole on all ranks, for use on `tokens`.

        Where tensor ranks share these, each has the gradient of its tokens alone, and their sum is taken.
        """
        if self.ranks is None or tokens is None or not tokens.divided:
            return parameter
        return self.ranks.copy(parameter)

    def dropout_key(self, *, site: int = 0) -> tuple[int, int, int]:
        """Returns (seed, step, hash of path and site): this layer's dropout is a function of it and of the elements'
        places in the step's global batch, and of nothing else.

        Args:
            site: tells apart the dropouts of one layer.
        """
        context = self.context
        # An odd multiplier keeps sites apart; the first leaves the path's hash as it is.
        salted = self.path_hash + site * 0xC2B2AE3D27D4EB4F
        return context.seed, context.step, salted & 0x7FFFFFFFFFFFFFFF

    def tokens_of(self, x: Tensor) -> Tokens:
        """Returns what `x` [B, T, ...] (B may be 1 for all rows) of whole rows holds of the step's global batch."""
        return Tokens(length=x.shape[1], row_start=self.context.row_start, row_stride=self.context.row_stride)

    def drop(
        self,
        x: Tensor,
        *,
        rate: float,
        site: int = 0,
        tokens: Tokens | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns `x` [B, T, D], in training with a share `rate` of its elements zeroed and the others scaled up.

        Args:
            x: an activation, or a part of one.
            rate: chance of an element to become zero.
            site: tells apart the dropouts of one layer.
            tokens: which rows and tokens `x` holds; None: the context's rows, whole.
            columns: (first, D) where `x` holds a run of the columns; None: all.
        """
        if not self.training or rate == 0.0:
            return x
        offset = starts(x, tokens=tokens or self.tokens_of(x), columns=columns)
        return dropout(x, rate=rate, key=self.dropout_key(site=site), offset=offset)

    def drop_add(
        self, x: Tensor, *, residual: Tensor, rate: float, site: int = 0, tokens: Tokens | None = None
    ) -> Tensor:
        """Returns `residual` + `drop(x)`, of [B, T, D]."""
        if not self.training or rate == 0.0:
            return residual + x
        offset = starts(x, tokens=tokens or self.tokens_of(x))
        return dropout_add(x, residual=residual, rate=rate, key=self.dropout_key(site=site), offset=offset)


def inherit(child: AnyParams, **values: Any) -> AnyParams:
    """Returns a copy of `child` in which each named param that still waits for its parent has the parent's value."""
    return child.replace(**{name: value for name, value in values.items() if getattr(child, name) is FROM_PARENT})


def initialize(module: nn.Module, *, seed: int, prefix: str = "task") -> None:
    """Gives every parameter of `module` its first values, each a function of (its path, `seed`) and of nothing else.

    Values are drawn in float32 on the CPU, then cast and copied to where the parameter lives, so that neither the order
    in which layers were made nor the device changes them.

    Args:
        module: a module whose parameters were all made by `Layer.create_parameter`.
        seed: of the run.
        prefix: what the path of `module` itself is.

    Raises:
        ParamsError: a parameter without a spec.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            path = f"{prefix}.{name}" if prefix else name
            if parameter.device.type == "cpu" and parameter.dtype == torch.float32 and shard_of(parameter) is None:
                first_values(parameter, path=path, seed=seed, out=parameter.data)
            else:
                parameter.copy_(first_values(parameter, path=path, seed=seed))


@torch.no_grad()
def first_values(parameter: Tensor, *, path: str, seed: int, out: Tensor | None = None) -> Tensor:
    """Returns what this rank holds of the first values of a parameter, in float32 on the CPU.

    Args:
        parameter: with `.spec` and, where divided, `.shard`; its own values are not read.
        path: of it.
        seed: of the run.
        out: takes the values of the whole; None: a new tensor.

    Raises:
        ParamsError: a parameter without a spec.
    """
    spec = getattr(parameter, "spec", None)
    if not isinstance(spec, ParameterSpec):
        raise must(path, "be made by Layer.create_parameter", "a bare parameter", "Create it through its Layer")
    generator = torch.Generator().manual_seed(stable_hash(f"{seed}/{path}"))
    values = torch.empty(spec.shape, dtype=torch.float32, device="cpu") if out is None else out
    parts = torch.split(values, list(spec.parts)) if spec.parts else (values,)
    for part, init in zip(parts, spec.part_inits or (spec.init,) * len(parts), strict=True):
        init.fill(part, generator=generator, axes=spec.axes)
    shard = shard_of(parameter)
    if shard is None:
        return values
    local = values.new_empty(shard.local_shape)
    for box in shard.boxes:
        box.of_local(local).copy_(box.of_global(values))
    return local


def bind(module: nn.Module, *, seed: int, prefix: str = "task") -> StepContext:
    """Tells every layer of `module` its path and gives all of them one `StepContext`, which is returned."""
    context = StepContext(seed=seed)
    for name, layer in module.named_modules():
        if isinstance(layer, Layer):
            layer.path = f"{prefix}.{name}".strip(".")
            layer.path_hash = stable_hash(layer.path)
            layer.context = context
    return context
