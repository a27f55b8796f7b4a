"""Imported once by the server from which rank processes are forked: what costs seconds to import."""

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.pipelining  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
    import deepspeed.runtime.zero.stage3  # noqa: F401

import megaseq.train.trainer  # noqa: E402, F401

torch.set_num_threads(1)
