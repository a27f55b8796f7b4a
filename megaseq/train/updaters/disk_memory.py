"""Tensors that lie in files on a local disk: masters and moments where `parallel.zero.offload_optimizer` is nvme."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megaseq.base.errors import AsText, must

_WILL_NEED, _DONT_NEED, _POPULATE_WRITE = 3, 4, 23
"""MADV_WILLNEED, MADV_DONTNEED and, from Linux 5.14 on, MADV_POPULATE_WRITE."""


class DiskMemory:
    """Makes tensors whose memory is mapped from files without names.

    They are read and written like any others, by pages as these are touched. What was touched counts as this process's
    memory until `release` or until the system wants it for something else. They stay as long as this object does; the
    files are gone when the process ends, however that happens: nothing that is to last may be in them alone.
    """

    def __init__(self, directory: str) -> None:
        """Takes the directory, which must exist.

        Raises:
            ParamsError: no file can be made in it.
        """
        self._directory = directory
        self._made: dict[int, Tensor] = {}
        # Kept, so that no memory of another kind ever has the address of one of them.
        self._advise = ctypes.CDLL(None, use_errno=True).madvise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.zeros(torch.empty(1))

    def zeros(self, like: Tensor) -> Tensor:
        """Returns zeros of the shape and type of `like`, which is in host memory, on the disk.

        Raises:
            ParamsError: the disk has no room for it, or the file cannot be made.
        """
        size = max(1, like.numel())
        try:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                # Reserved at once: a full disk would end the process when a page is written.
                os.posix_fallocate(file.fileno(), 0, size * like.element_size())
                flat = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=size, dtype=like.dtype)
        except OSError as error:
            needed = f"{size * like.element_size() / 2**20:.0f} MiB more"
            raise must(
                "parallel.zero.nvme_path",
                f"be a directory on a disk that has room, now for {needed}",
                AsText(f"{self._directory} ({error.strerror})"),
                "Set it to another one, or parallel.zero.offload_optimizer=cpu",
            ) from None
        self._made[flat.data_ptr()] = flat
        return flat[: like.numel()].view(like.shape)

    def like(self, tensor: Tensor) -> Tensor:
        """Returns room for a copy of `tensor` on the disk; see `megaseq.checkpoint.staging.Room`."""
        return self.zeros(tensor)

    @torch.no_grad()
    def move(self, tensor: Tensor) -> None:
        """Moves the contents of `tensor` to the disk; others that view its old memory keep that."""
        kept = self.zeros(tensor).copy_(tensor)
        tensor.data = kept
        self.release([tensor])

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Begins to read `tensors`, which are going to be used, from the disk."""
        self._tell(tensors, advice=_WILL_NEED)

    def occupy(self, tensors: Iterable[Tensor]) -> None:
        """Takes all memory that writing to `tensors` is going to need, which costs less than page by page."""
        self._tell(tensors, advice=_POPULATE_WRITE)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Gives back the memory that `tensors` take up; their contents are on the disk, or on their way to it.

        Those that are not on the disk are left alone.
        """
        self._tell(tensors, advice=_DONT_NEED)

    def _tell(self, tensors: Iterable[Tensor], *, advice: int) -> None:
        """Tells the system what comes; none of it changes contents, so that a system that does not know it may err."""
        page = os.sysconf("SC_PAGE_SIZE")
        for start, stop in self._mapped(tensors):
            first = start // page * page
            self._advise(first, stop - first, advice)

    def _mapped(self, tensors: Iterable[Tensor]) -> Sequence[tuple[int, int]]:
        """Returns (start, stop) of the memory of those tensors that are on the disk: elsewhere it would be lost."""
        found = []
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() in self._made and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                found.append((start, start + (last + 1) * tensor.element_size()))
        return found
