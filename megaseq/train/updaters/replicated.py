"""The updater of ZeRO stage 0: every data-parallel rank holds all masters and moments of its part of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.checkpoint.piece import Piece, shard_pieces, whole_piece
from megaseq.learner import Learner
from megaseq.learner.learner import UpdateStats
from megaseq.parallel.gradient_sums import GradientSums, overlapped_bucket
from megaseq.parallel.gradients import (
    counted_boxes,
    counted_views,
    is_expert,
    names_of_all_stages,
    squared_norm_reduction,
)
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import TiedTensors
from megaseq.parallel.spec import ParameterSpec, shard_of
from megaseq.tasks.base import BaseTask, LossOutput
from megaseq.train.precision import MasterWeights, Precision
from megaseq.train.updaters.disk_memory import DiskMemory

PREFIX = "task."


class Replicated:
    """Sums gradients over data-parallel and context ranks in flat buckets, then lets the learner update all of them."""

    disk: DiskMemory | None = None

    def __init__(
        self,
        task: BaseTask,
        *,
        learner_params: Learner.Params,
        precision: Precision,
        mesh: Mesh | None,
        bucket_elements: int,
        overlap: bool = True,
    ) -> None:
        """Makes the masters and the learner.

        Args:
            task: initialised, on its device.
            learner_params: of the run.
            precision: of the weights that the task computes with.
            mesh: None is one process.
            bucket_elements: of gradients that are summed together.
            overlap: whether a bucket is sent while the last backward pass of a step goes on. Stages of a pipeline send
                when they are done, which most of them are before others.
        """
        self._task = task
        self._mesh = mesh
        self._bucket_elements = bucket_elements
        parameters = {f"{PREFIX}{name}": parameter for name, parameter in task.named_parameters()}
        self._described = {name: (shard_of(value), _global_shape(value)) for name, value in parameters.items()}
        self._experts = {name for name, value in parameters.items() if is_expert(value)}
        boxes = counted_boxes(parameters, mesh=mesh)
        self._tied = TiedTensors(parameters, mesh=mesh)
        self._weights = MasterWeights(task, precision=precision)
        self.learner: Learner = learner_params.instantiate(
            named_parameters={f"{PREFIX}{name}": master for name, master in self._weights.masters.items()},
            reduce_squared_norm=squared_norm_reduction(mesh),
            counted=None if all(counted is None for counted in boxes.values()) else counted_views(boxes),
            known=names_of_all_stages(list(parameters), mesh=mesh),
        )
        self._first = True
        """Whether the backward pass that goes on is the first of its step."""
        self._sums: list[GradientSums] = []
        if mesh is not None:
            names = [name for name in self.learner.trainable if name not in self._experts]
            experts = [name for name in self.learner.trainable if name in self._experts]
            for own, group in (
                (names, mesh.group("data", "context")),
                (experts, mesh.group("expert_data", "context")),
            ):
                if own and group is not None:
                    watched = {name: parameters[name] for name in own} if overlap and mesh.size("pipe") == 1 else {}
                    self._sums.append(self._make_sums(own, group=group, watched=watched))

    def _make_sums(
        self, names: Sequence[str], *, group: dist.ProcessGroup, watched: Mapping[str, Tensor]
    ) -> GradientSums:
        """Returns what sums gradients over the ranks that saw other rows or tokens.

        Args:
            names: of the parameters.
            group: these ranks.
            watched: the same parameters as the task computes with, if sums begin in the backward pass.
        """
        tensors = {name: self.learner.trainable[name] for name in names}
        size = self._bucket_elements
        if watched:
            size = overlapped_bucket(sum(t.numel() for t in tensors.values()), bucket_elements=size)
        sums = GradientSums(tensors, group=group, bucket_elements=size, collect=self._collect_gradients)
        if watched:
            sums.watch(watched)
        return sums

    def _collect_gradients(self, names: Sequence[str]) -> None:
        self._weights.collect_gradients(first=self._first, names=[name.removeprefix(PREFIX) for name in names])

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """See `Updater.compute_loss`."""
        return self._task.compute_loss(batch)

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """See `Updater.backward`."""
        self._first = first
        if last:
            for sums in self._sums:
                sums.begin()
        loss.backward()  # type: ignore[no-untyped-call]
        self._weights.collect_gradients(first=first)

    def before_stage_backward(self) -> None:
        """See `Updater.before_stage_backward`."""

    def after_stage_backward(self) -> None:
        """See `Updater.after_stage_backward`."""
        self._weights.collect_gradients(first=False)

    def update(self, *, step: int) -> UpdateStats:
        """See `Updater.update`."""
        self._sum_gradients()
        stats = self.learner.update(step=step)
        self._weights.publish()
        self._weights.clear_gradients()
        return stats

    def _sum_gradients(self) -> None:
        """Sums over ranks what is not summed yet; a rank on which a parameter had no part gives zeros."""
        if self._mesh is None:
            return
        for sums in self._sums:
            sums.finish()
        for master in self.learner.trainable.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = {name: master.grad for name, master in self.learner.trainable.items() if master.grad is not None}
        self._tied.sum(gradients, bucket_elements=self._bucket_elements)

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool) -> Iterator[None]:
        """See `Updater.evaluating`."""
        with self.learner.averages(on_change=self._weights.publish) if averaged else contextlib.nullcontext():
            yield

    def parameter_pieces(self) -> list[Piece]:
        """See `Updater.parameter_pieces`; buffers too."""
        masters = {f"{PREFIX}{name}": master.detach() for name, master in self._weights.masters.items()}
        found = [piece for name, master in masters.items() for piece in self._pieces_of(name, master, of=name)]
        for name, tensor in self._task.state_dict(keep_vars=True).items():
            if f"{PREFIX}{name}" not in masters:
                found.append(whole_piece(f"{PREFIX}{name}", tensor.detach()))
        return found

    def pieces(self) -> list[Piece]:
        """See `Updater.pieces`."""
        found = self.parameter_pieces()
        for name, tensor in self.learner.state_tensors().items():
            owner = name[name.index(PREFIX) :]
            found += self._pieces_of(name, tensor, of=owner)
        return found

    def _pieces_of(self, name: str, tensor: Tensor, *, of: str) -> list[Piece]:
        """Cuts something of the shape of parameter `of` as that one is cut."""
        shard, shape = self._described[of]
        local = shape if shard is None else shard.local_shape
        if tuple(tensor.shape) != local:
            # A factored moment has one dimension less; where the parameter is whole, it is whole too.
            return [whole_piece(name, tensor)]
        return shard_pieces(name, tensor, shard=shard, global_shape=shape)

    def publish(self) -> None:
        """See `Updater.publish`."""
        self._weights.publish()


def _global_shape(parameter: Tensor) -> tuple[int, ...]:
    spec: ParameterSpec | None = getattr(parameter, "spec", None)
    return tuple(parameter.shape) if spec is None else spec.shape
