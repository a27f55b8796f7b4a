"""What DeepSpeed asks about a mesh: the groups along which it shares state, and those along which ranks hold parts."""

from __future__ import annotations

import torch.distributed as dist

from megaseq.parallel.mesh import Mesh


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`, in Megatron's names.

    Data parallel are all ranks that hold the same parameters: those along `data` and `context`. Model parallel are
    those that together hold one model: along `pipe` and `tensor`.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Takes the groups of the mesh; all ranks at the same time, torch.distributed is initialised."""
        self._mesh = mesh
        # DeepSpeed wants a group also where a rank is alone along an axis.
        self._alone: dist.ProcessGroup = dist.new_group([mesh.rank], use_local_synchronization=True)

    def _group(self, *axes: str) -> dist.ProcessGroup:
        group = self._mesh.group(*axes)
        return self._alone if group is None else group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share optimizer state, gradients and parameters by ZeRO."""
        return self._group("data", "context")

    def get_data_parallel_rank(self) -> int:
        """Place of this rank among them."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.size("data", "context")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one model."""
        return self._group("pipe", "tensor")

    def get_model_parallel_rank(self) -> int:
        """Place of this rank among them."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.size("pipe", "tensor")

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share each matrix."""
        return self._group("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        """Place of this rank among them."""
        return self._mesh.index("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.size("tensor")

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the stages of one pipeline."""
        return self._group("pipe")

    def get_pipeline_model_parallel_rank(self) -> int:
        """Place of this rank among them."""
        return self._mesh.index("pipe")

    def get_pipeline_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.size("pipe")
