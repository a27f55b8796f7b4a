"""The updater of ZeRO stage 0: every data-parallel rank holds all masters and moments of its part of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.checkpoint.piece import Piece, shard_pieces, whole_piece
from megaseq.learner import Learner
from megaseq.learner.learner import UpdateStats
from megaseq.parallel.gradients import (
    counted_boxes,
    counted_views,
    is_expert,
    names_of_all_stages,
    squared_norm_reduction,
    sum_over,
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
    ) -> None:
        """Makes the masters and the learner.

        Args:
            task: initialised, on its device.
            learner_params: of the run.
            precision: of the weights that the task computes with.
            mesh: None is one process.
            bucket_elements: of gradients that are summed together.
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

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """See `Updater.compute_loss`."""
        return self._task.compute_loss(batch)

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """See `Updater.backward`."""
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
        """Sums over the ranks that saw other rows or tokens; a rank on which a parameter had no part gives zeros."""
        if self._mesh is None:
            return
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, master in self.learner.trainable.items():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            (experts if name in self._experts else dense).append(master.grad)
        sum_over(dense, group=self._mesh.group("data", "context"), bucket_elements=self._bucket_elements)
        sum_over(experts, group=self._mesh.group("expert_data", "context"), bucket_elements=self._bucket_elements)
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
