"""What each unit of a model keeps, needs for a moment, computes and sends: measured on tensors without values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megaseq.base import NestedMap
from megaseq.base.errors import must
from megaseq.layers.attention import Attention
from megaseq.layers.base import bind
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.linear import Linear
from megaseq.layers.units import UnitRun
from megaseq.parallel.spec import ParameterSpec, Pipelined, Unit
from megaseq.tasks.base import BaseTask
from megaseq.train.activation_checkpointing import ActivationCheckpointing, checkpoint_activations, mode_of
from megaseq.train.planning.halves import first_half
from megaseq.train.planning.live_memory import LiveMemory
from megaseq.train.planning.stand_ins import install_stand_ins
from megaseq.train.precision import low_precision_parameters


@dataclasses.dataclass(frozen=True)
class Shape:
    """A micro-batch on one rank."""

    rows: int
    source_length: int
    target_length: int


@dataclasses.dataclass(frozen=True)
class UnitTrace:
    """One unit on one rank, for one micro-batch; bytes."""

    kept: int
    """Alive from the unit's forward pass to its backward pass, less what it no longer needs of the unit before."""
    divisible: int
    """Part of `kept` that tensor ranks share under `parallel.sequence`."""
    first: int
    """What its backward pass allocates at most, gradients of its parameters included."""
    again: int
    """The same where these are there and are added to."""
    half: int
    """What the gradients of its inputs alone allocate at most, where those of its parameters come later."""
    between: int
    """Part of `half` that is kept for those."""


def local_params(task: BaseTask.Params, *, tensor: int) -> BaseTask.Params:
    """Returns params of a task as wide as one of `tensor` ranks computes it; embeddings stay whole."""
    local = task.copy()
    for path, attention in local.find(Attention):
        if attention.head_dim is None:
            width = _width(local, path=path)
            attention.head_dim = width // attention.num_heads
        keys = attention.num_key_value_heads or attention.num_heads
        attention.num_heads //= tensor
        attention.num_key_value_heads = max(1, keys // tensor)
    for _, ffn in local.find(FeedForward):
        ffn.hidden_dim = -(-ffn.hidden_dim // tensor)
    return local


def _width(task: BaseTask.Params, *, path: str) -> int:
    """Returns the model width of an attention that inherits it."""
    keys = path.split(".")
    for end in range(len(keys), -1, -1):
        owner = task.get(".".join(keys[:end])) if end else task
        value = owner.get("model_dim") if "model_dim" in owner else None
        if isinstance(value, int):
            return value
    raise must(path, "have a width", None, "Set model_dim")


def meta_task(task: BaseTask.Params) -> BaseTask:
    """Returns the task with parameters that have shapes and no values.

    Raises:
        ParamsError: a task that is not made of units.
    """
    with torch.device("meta"):
        built: BaseTask = task.instantiate()
    bind(built, seed=0)
    if not isinstance(built, Pipelined):
        raise must("task", "be made of units", type(built).__name__, "Plan an encoder-decoder")
    return built


def units_of(task: BaseTask) -> tuple[Unit, ...]:
    """Returns the units of what `meta_task` made."""
    return cast(Pipelined, task).units()


class _Reads:
    """Notes which storages the maps that tensor ranks share read, in a unit's forward pass."""

    def __init__(self) -> None:
        self.joined: set[int] = set()
        """Each rank has some tokens, which the map joins, and joins again in its backward pass."""
        self.whole: set[int] = set()
        """All ranks have all tokens, or their own part of the width."""

    @contextlib.contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Watches all maps of a module."""

        def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            spec = getattr(linear.weight, "spec", None)
            axes = spec.axes if isinstance(spec, ParameterSpec) else (None,)
            storage = inputs[0].untyped_storage()._cdata
            if axes[0] in ("heads", "hidden") and not getattr(linear, "input_is_copied", False):
                self.joined.add(storage)
            elif {"heads", "hidden"} & set(axes):
                self.whole.add(storage)

        handles = [part.register_forward_pre_hook(note) for part in module.modules() if isinstance(part, Linear)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, *, whole: set[int]) -> None:
        """Forgets what other units have read, of whose storages the places may be others' now."""
        self.joined, self.whole = set(), whole


class ModelTrace:
    """The units of a model, as one of `tensor` ranks computes them."""

    def __init__(
        self,
        task: BaseTask.Params,
        *,
        tensor: int = 1,
        precision: str = "fp32",
        checkpointing: ActivationCheckpointing.Params | None = None,
    ) -> None:
        """Builds the model without values.

        Args:
            task: complete, vocabulary sizes too.
            tensor: ranks that share the matrices.
            precision: fp32, bf16 or bf16_autocast.
            checkpointing: what layers compute again.
        """
        self._task = meta_task(local_params(task, tensor=tensor))
        if precision == "bf16":
            for parameter in low_precision_parameters(self._task).values():
                parameter.data = parameter.data.to(torch.bfloat16)
        install_stand_ins(self._task)
        self._checkpointing = checkpointing or ActivationCheckpointing.Params()
        checkpoint_activations(self._task, params=self._checkpointing)
        self._task.train()
        self.units = units_of(self._task)

    def run(self, shape: Shape) -> dict[str, UnitTrace]:
        """Traces every unit on a micro-batch; returns them by name."""
        batch = _batch(shape)
        run = UnitRun(self._task, batch=batch)  # type: ignore[arg-type]
        carry: dict[str, Tensor] = {}
        found: dict[str, UnitTrace] = {}
        alike: dict[object, UnitTrace] = {}
        reads = _Reads()
        with reads.of(self._task), LiveMemory() as memory:
            memory.track([*self._task.parameters(), *self._task.buffers(), *batch.flatten()])
            for unit in self.units:
                kind = self._kind(unit)
                if kind not in alike:
                    first, again = self._backward(unit, carry=carry, run=run, memory=memory)
                    between, half = self._first_half(unit, carry=carry, run=run, memory=memory)
                    carry, kept, divisible = self._forward(unit, carry=carry, run=run, memory=memory, reads=reads)
                    alike[kind] = UnitTrace(kept, divisible, first, again, half, between)
                found[unit.name] = alike[kind]
        return found

    def _kind(self, unit: Unit) -> object:
        """Returns what is equal for units that keep and need the same: layers of one shape and mode, say."""
        if not _is_layer(unit):
            return unit.name
        own = f"{unit.name}."
        parameters = dict(self._task.named_parameters())
        shapes = {name: parameters[name].shape for name in sorted(unit.tensors) if name in parameters}
        local = tuple((name.removeprefix(own), tuple(size)) for name, size in shapes.items())
        return unit.name.partition(".")[0], tuple(flow.name for flow in unit.leaves), local, self._mode(unit)

    def _mode(self, unit: Unit) -> str:
        return mode_of(f"task.{unit.name}", params=self._checkpointing) if _is_layer(unit) else "none"

    def _forward(
        self, unit: Unit, *, carry: dict[str, Tensor], run: UnitRun, memory: LiveMemory, reads: _Reads
    ) -> tuple[dict[str, Tensor], int, int]:
        """Returns what the unit leaves, the bytes that it keeps, and how many of them tensor ranks may share."""
        widths = {value.shape[-1] for value in carry.values()}
        found: dict[int, tuple[int, bool]] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Maps flatten what they read; the residual stream has three dimensions in all else.
            wide = tensor.dim() == 3 and tensor.shape[-1] in widths
            found[storage._cdata] = (storage.nbytes(), wide or found.get(storage._cdata, (0, False))[1])
            return tensor

        # What a stack gives is not shared by tensor ranks.
        reads.begin(whole={value.untyped_storage()._cdata for name, value in carry.items() if name == "memory"})
        before = memory.current
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = run.run(carry, unit=unit)
        shared = {
            storage: size
            for storage, (size, wide) in found.items()
            if (wide or storage in reads.joined) and storage not in reads.whole
        }
        carry.clear()
        kept = memory.current - before
        return made, kept, kept if self._mode(unit) == "full" else min(kept, sum(shared.values()))

    def _backward(
        self, unit: Unit, *, carry: Mapping[str, Tensor], run: UnitRun, memory: LiveMemory
    ) -> tuple[int, int]:
        """Runs the unit by itself; returns what the backward pass allocates, without and with gradients there."""
        peaks: list[int] = []
        for _ in range(2):
            inputs = {name: value.detach().requires_grad_() for name, value in carry.items()}
            outputs = [value for value in run.run(inputs, unit=unit).values() if value.requires_grad]
            gradients = [torch.empty_like(value) for value in outputs]
            start = memory.reset_peak()
            torch.autograd.backward(outputs, gradients)
            peaks.append(memory.peak - start)
            del inputs, outputs, gradients
        for parameter in self._task.parameters():
            parameter.grad = None
        return peaks[0], peaks[1]

    def _first_half(
        self, unit: Unit, *, carry: Mapping[str, Tensor], run: UnitRun, memory: LiveMemory
    ) -> tuple[int, int]:
        """Runs the unit by itself; returns what the first half of its backward pass leaves, and its peak."""
        if not carry or self._mode(unit) not in ("none", "selective"):
            return 0, 0  # Nothing is sent back, or such schedules are refused.
        inputs = {name: value.detach().requires_grad_() for name, value in carry.items()}
        outputs = [value for value in run.run(inputs, unit=unit).values() if value.requires_grad]
        return first_half(outputs, inputs=list(inputs.values()), memory=memory)


def _is_layer(unit: Unit) -> bool:
    return ".layers." in unit.name


def _batch(shape: Shape) -> NestedMap:
    def side(length: int) -> NestedMap:
        ids = torch.empty((shape.rows, length), dtype=torch.int64, device="meta")
        return NestedMap(ids=ids, positions=torch.empty((1, length), dtype=torch.int64, device="meta"))

    return NestedMap(source=side(shape.source_length), target=side(shape.target_length))
