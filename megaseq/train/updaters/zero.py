"""The updater of ZeRO stages 1 to 3: DeepSpeed's engine shares and reduces, our learner updates flat fp32 shares."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaseq.base import NestedMap
from megaseq.checkpoint.piece import Piece, whole_piece
from megaseq.learner import Learner, ParameterGroup
from megaseq.learner.clipping import global_norm
from megaseq.learner.learner import UpdateStats
from megaseq.parallel.gradients import all_reduce_sum, counted_boxes, is_expert, names_of_all_stages
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.placeholder import placeholder
from megaseq.parallel.spec import ParameterSpec, shard_of
from megaseq.tasks.base import BaseTask, LossOutput
from megaseq.train.precision import Precision, low_precision_parameters
from megaseq.train.updaters.deepspeed_config import deepspeed_config
from megaseq.train.updaters.deepspeed_package import check_nvme, start_deepspeed
from megaseq.train.updaters.disk_memory import DiskMemory
from megaseq.train.updaters.expert_sharing import mark_experts, options_of, sign_of_experts
from megaseq.train.updaters.first_shares import ExactRun, FirstShares, Values
from megaseq.train.updaters.frozen import frozen_of
from megaseq.train.updaters.gathered import gathered
from megaseq.train.updaters.shares import Described, Fragment, fragments_of, lies_in, runs_of, shares_of
from megaseq.train.updaters.tied_gradients import TiedGradients

PREFIX = "task."
STREAMED_ELEMENTS = 1 << 22
"""Elements of a share that are updated together where masters and moments lie on a disk."""
WORLD_AXES = ("data", "pipe", "context", "tensor")


class LossModule(nn.Module):
    """What DeepSpeed's engine calls: the loss of a task."""

    def __init__(self, task: BaseTask, *, sign: nn.Module | None) -> None:
        """Takes the task, and what tells DeepSpeed that it has experts."""
        super().__init__()
        self.task = task
        self.sign = sign
        self.output: LossOutput | None = None
        """Of the last forward pass."""

    def forward(self, batch: NestedMap) -> Tensor:
        """Returns the sum that is differentiated."""
        self.output = self.task.compute_loss(batch)
        return self.output.loss_sum


class ShareOptimizer(torch.optim.Optimizer):
    """What DeepSpeed takes for an optimizer: it passes every share that is to be updated on."""

    def __init__(self, groups: Sequence[ParameterGroup], *, update: Callable[[Tensor], None]) -> None:
        """Takes the groups, of whose parameters DeepSpeed makes the shares, and what is called with a share."""
        super().__init__([{"params": list(group.tensors), **options_of(group)} for group in groups], {"lr": 0.0})
        self._update = update

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the shares that DeepSpeed has put into `param_groups`."""
        for group in self.param_groups:
            for share in group["params"]:
                self._update(share)


class Zero:
    """Drives DeepSpeed's engine; its optimizer asks back for the norm and for the update of each share."""

    def __init__(
        self,
        task: BaseTask,
        *,
        learner_params: Learner.Params,
        precision: Precision,
        mesh: Mesh | None,
        parallel: Parallel.Params,
        device: torch.device | None = None,
        values: Values | None = None,
    ) -> None:
        """Hands the parameters over to DeepSpeed and makes the learner's state for this rank's shares.

        Args:
            task: initialised, on its device; or, with `values`, without values.
            learner_params: of the run.
            precision: of the weights that the task computes with.
            mesh: None is one process.
            parallel: of the run.
            device: of this process; None: where the parameters are.
            values: in stage 3, first values of parameters that have no memory yet.

        Raises:
            MissingPackageError: DeepSpeed is not installed.
        """
        self._task = task
        self._mesh = mesh
        self._stage = parallel.zero.stage
        self._offloads = parallel.zero.offload_optimizer != "none"
        self.disk: DiskMemory | None = None
        if parallel.zero.offload_optimizer == "nvme":
            self.disk = DiskMemory(parallel.zero.nvme_path)
        self._device = device or next(task.parameters()).device
        parameters = {f"{PREFIX}{name}": parameter for name, parameter in task.named_parameters()}
        described = {id(value): _describe(name, value) for name, value in parameters.items()}
        # Shares of what all data ranks hold are disjoint, also along `expert`.
        self._boxes = counted_boxes(parameters, mesh=mesh, axes=("pipe", "tensor"))
        self.learner: Learner = learner_params.instantiate(
            named_parameters=parameters, deferred=True, known=names_of_all_stages(list(parameters), mesh=mesh)
        )
        exact = self._lower(task, precision=precision, is_empty=values is not None)
        for name in self.learner.frozen:
            parameters[name].requires_grad_(False)
        self._tied = TiedGradients(
            {name: parameters[name] for name in self.learner.trainable}, mesh=mesh, kept=self._stage == 2
        )
        mark_experts(parameters.values(), mesh=mesh, device=self._device)
        shares_experts = any(map(is_expert, self.learner.trainable.values()))
        sign = sign_of_experts(self._device) if shares_experts and self._stage < 3 else None
        self._module = LossModule(task, sign=sign)
        groups = _uniform(self.learner.assignment.groups)
        optimizer = ShareOptimizer(groups, update=self._update_share)
        config = deepspeed_config(parallel)
        if parallel.zero.offload_parameters == "nvme":
            check_nvme(self._device, frozen=self.learner.frozen)
        first = FirstShares(parameters, values=values, device=self._device) if values is not None else None
        self.engine: Any = start_deepspeed(
            self._module, optimizer=optimizer, config=config, mesh=mesh, device=self._device, first_shares=first
        )
        exact = exact if first is None else first.exact
        self._zero: Any = self.engine.optimizer
        self._shares = shares_of(self._zero, stage=self._stage)
        self._index = {id(share): index for index, share in enumerate(self._shares)}
        self._fragments = fragments_of(self._zero, stage=self._stage, described=described)
        self._frozen = [
            frozen_of(parameters[name], about=described[id(parameters[name])], exact=exact)
            for name in self.learner.frozen
        ]
        self._restore_exact(exact)
        exact.clear()  # Before there are moments.
        if self.disk is not None:
            self._put_on_disk(self.disk)
        self._runs = runs_of(self._shares, limit=STREAMED_ELEMENTS if self.disk is not None else 0)
        self._run_fragments = [
            [part for fragment in self._fragments[run.share] if (part := run.cut(fragment, index=index)) is not None]
            for index, run in enumerate(self._runs)
        ]
        self.learner.take_shares(self._run_groups(groups))
        self._of_run = [
            [run.of(self._shares[run.share].detach()), *(tensors[index] for tensors in self._state_by_slot().values())]
            for index, run in enumerate(self._runs)
        ]
        self._data_ranks = mesh.size("data", "context") if mesh is not None else 1
        self._norm_group = mesh.group(*WORLD_AXES) if mesh is not None else None
        self._step = 0
        self._stats: UpdateStats | None = None
        # DeepSpeed's norm counts, rounds and treats what is not finite in its own way.
        setattr(self._zero, "scaled_global_norm" if self._stage < 3 else "_get_norm_groups", self._decide)

    def _lower(self, task: BaseTask, *, precision: Precision, is_empty: bool) -> dict[str, ExactRun]:
        """Rounds the weights to bf16 where the precision says so; returns the exact values, if any, on the host.

        Stage 3 wants one format for all that trains; below it norms stay in fp32.
        """
        if precision != "bf16":
            return {}
        exact: dict[str, ExactRun] = {}
        lowered = dict(task.named_parameters()) if self._stage == 3 else low_precision_parameters(task)
        for name, parameter in lowered.items():
            if is_empty:
                parameter.data = placeholder(parameter.shape, dtype=torch.bfloat16)
                continue
            exact[f"{PREFIX}{name}"] = ExactRun(parameter.detach().to("cpu", copy=True).flatten())
            parameter.data = parameter.data.to(torch.bfloat16)
        return exact

    def _restore_exact(self, exact: Mapping[str, ExactRun]) -> None:
        """Undoes in the shares what rounding the weights did to the first values."""
        with torch.no_grad():
            for share, row in zip(self._shares, self._fragments, strict=True):
                for fragment in row:
                    values = exact.get(fragment.parameter.name)
                    if values is not None and fragment.length:
                        fragment.of(share.detach()).copy_(values.run(fragment.first, fragment.length))

    def _put_on_disk(self, disk: DiskMemory) -> None:
        """Moves the shares to the disk."""
        # DeepSpeed keeps views of them for its own checkpoints, which we do not write.
        for parameter in self._task.parameters():
            parameter._hp_mapping = None  # type: ignore[attr-defined]
        for share in self._shares:
            disk.move(share)

    def _run_groups(self, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
        """Returns a group of the learner for each run: all that is in one share is treated alike."""
        treated = {name: group for group in groups for name in group.names}
        found = []
        zeros = torch.zeros_like if self.disk is None else self.disk.zeros
        for index, run in enumerate(self._runs):
            row = self._fragments[run.share]
            # This rank's part of a group may be padding alone; stages 1 and 2 have a share for each group.
            source = treated[row[0].parameter.name] if row else groups[run.share]
            found.append(
                ParameterGroup(
                    names=(str(index),),
                    tensors=(run.of(self._shares[run.share].detach()),),
                    weight_decay=source.weight_decay,
                    learning_rate_scale=source.learning_rate_scale,
                    zeros=zeros,
                )
            )
        return found

    # ---- a step --------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """See `Updater.compute_loss`."""
        loss_sum = self.engine(batch)
        output = self._module.output
        assert output is not None
        self._module.output = None
        # Stage 3 hangs what must happen before the backward pass on the module's result.
        return dataclasses.replace(output, loss_sum=loss_sum)

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """See `Updater.backward`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def before_stage_backward(self) -> None:
        """See `Updater.before_stage_backward`."""
        if self._stage == 2:
            # What the engine's own forward and backward do around autograd; here a schedule calls it.
            self._zero.clear_backward_seen_flag()
            self._zero.set_gradient_accumulation_boundary(False)
            self.engine._running_engine_backward = True
            self._zero.enter_backward()

    def after_stage_backward(self) -> None:
        """See `Updater.after_stage_backward`."""
        if self._stage == 2:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
            self._zero.exit_backward()
            self.engine._running_engine_backward = False
        # Stage 1 keeps the sum of bf16 gradients in fp32.
        self._zero.backward_epilogue()

    def update(self, *, step: int) -> UpdateStats:
        """See `Updater.update`."""
        self._step = step
        if self._stage == 1:
            # Some schedules leave gradients without telling autograd's hooks, which make the buckets.
            self._zero.setup_buckets()
            self._tied.sum_gradients(self._zero.get_param_gradient_attribute)
        elif self._stage == 2:
            self._tied.sum_kept()
        self.engine.step()
        stats = self._stats
        if stats is None or stats.step != step:
            raise RuntimeError("DeepSpeed's optimizer has not asked for the norm of the gradient")
        if not stats.skipped and self.disk is None:
            self.learner.average()
        self._release()
        return stats

    def _decide(self, *_: Any) -> Any:
        """Decides on the update from the true norm; DeepSpeed is told one that changes nothing."""
        if self._offloads and self._device.type != "cpu":
            # Gradients are on their way to the host.
            torch.accelerator.synchronize(self._device)
        self._add_tied()
        # DeepSpeed has averaged over data-parallel ranks what is to be summed.
        squares = global_norm(list(self._counted_gradients()), reduce=self._sum_over_ranks, device=self._device)
        self._stats = self.learner.decide(step=self._step, norm=squares * self._data_ranks)
        nothing = torch.zeros(())
        return nothing if self._stage < 3 else [nothing]

    def _sum_over_ranks(self, squared: Tensor) -> Tensor:
        return all_reduce_sum(squared.to(self._device), group=self._norm_group)

    def _counted_gradients(self) -> Iterator[Tensor]:
        for index, row in enumerate(self._fragments):
            for fragment, gradient in zip(row, self._gradients(index, row), strict=True):
                yield from fragment.counted(gradient, boxes=self._boxes[fragment.parameter.name])

    def _gradients(self, index: int, row: Sequence[Fragment]) -> list[Tensor]:
        """Returns the gradient [length] of each fragment of a share, before DeepSpeed flattens them."""
        flat = self._shares[index].grad
        if flat is None:
            listed = self._zero.averaged_gradients[index]
            flat = getattr(listed, "flat_partition", None)
        if flat is not None:
            return [fragment.of(flat) for fragment in row]
        return [
            gradient.reshape(-1)[: fragment.length] for fragment, gradient in zip(row, listed[: len(row)], strict=True)
        ]

    def _add_tied(self) -> None:
        """Puts the gradients of tied tensors, which stage 2 was not shown, where they belong in the shares."""
        kept = self._tied.kept
        for index, row in enumerate(self._fragments if kept else ()):
            for fragment, gradient in zip(row, self._gradients(index, row), strict=True):
                if fragment.parameter.name in kept:
                    total = kept[fragment.parameter.name].view(-1)[fragment.first : fragment.first + fragment.length]
                    gradient.copy_(total / self._data_ranks)
        self._tied.clear()

    def _update_share(self, share: Tensor) -> None:
        """Called by DeepSpeed for each share, with its gradient in place."""
        stats = self._stats
        if stats is None or stats.skipped:
            return
        assert share.grad is not None
        for index, run in enumerate(self._runs):
            if run.share != self._index[id(share)]:
                continue
            gradient = run.of(share.grad)
            if self.disk is not None:
                self.disk.occupy(self._of_run[index])
                self.disk.expect(self._of_run[(index + 1) % len(self._runs)])
            self.learner.apply(stats, group=index, gradients=(gradient,), gradient_scale=float(self._data_ranks))
            if self.disk is not None:
                self.learner.average(group=index)
                self.disk.release(self._of_run[index])

    def _release(self) -> None:
        """Gives back the memory of what lies on a disk and has been read."""
        if self.disk is not None:
            for tensors in self._of_run:
                self.disk.release(tensors)

    # ---- between the steps ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool) -> Iterator[None]:
        """See `Updater.evaluating`."""
        with self.learner.averages(on_change=self.publish) if averaged else contextlib.nullcontext():
            if self._stage < 3:
                yield
            else:
                with gathered(self._module, optimizer=self._zero):
                    yield

    def publish(self) -> None:
        """See `Updater.publish`."""
        zero = self._zero
        for frozen in self._frozen:
            frozen.publish()
        if self._stage < 3:
            zero.update_lp_params()
        else:
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        self._release()

    def parameter_pieces(self) -> list[Piece]:
        """See `Updater.parameter_pieces`."""
        found = self._pieces_in([run.of(self._shares[run.share]) for run in self._runs])
        for frozen in self._frozen:
            found += frozen.pieces()
        names = {name for name, _ in self._task.named_parameters()}
        for name, tensor in self._task.state_dict(keep_vars=True).items():
            if name not in names:
                found.append(whole_piece(f"{PREFIX}{name}", tensor.detach()))
        return found

    def pieces(self) -> list[Piece]:
        """See `Updater.pieces`."""
        found = self.parameter_pieces()
        for slot, flats in self._state_by_slot().items():
            found += self._pieces_in(flats, prefix=f"{slot}.")
        return found

    def _state_by_slot(self) -> dict[str, list[Tensor]]:
        """Returns what the learner keeps, a tensor for each run, by its kind."""
        by_slot: dict[str, list[Tensor]] = {}
        for name, tensor in self.learner.state_tensors().items():
            by_slot.setdefault(name.rpartition(".")[0], []).append(tensor)
        return by_slot

    def _pieces_in(self, flats: Sequence[Tensor], *, prefix: str = "") -> list[Piece]:
        return [
            # Shares of ranks that hold the same may be cut in other places: what counts for the norm is written.
            dataclasses.replace(piece, is_copy=not lies_in(piece, boxes=self._boxes[fragment.parameter.name]))
            for flat, row in zip(flats, self._run_fragments, strict=True)
            for fragment in row
            for piece in fragment.pieces(f"{prefix}{fragment.parameter.name}", flat=flat.detach())
        ]


def _uniform(groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """Splits groups so that each can be one flat tensor, which the same ranks share."""
    found = []
    for group in groups:
        parts: dict[tuple[torch.dtype, bool], list[tuple[str, Tensor]]] = {}
        for name, tensor in zip(group.names, group.tensors, strict=True):
            parts.setdefault((tensor.dtype, is_expert(tensor)), []).append((name, tensor))
        for part in parts.values():
            names, tensors = zip(*part, strict=True)
            found.append(dataclasses.replace(group, names=names, tensors=tensors))
    return found


def _describe(name: str, parameter: Tensor) -> Described:
    spec: ParameterSpec | None = getattr(parameter, "spec", None)
    local = tuple(parameter.shape)
    return Described(
        name=name,
        shard=shard_of(parameter),
        global_shape=local if spec is None else spec.shape,
        local_shape=local,
    )
