"""Imported once by the server from which rank processes are forked: what costs seconds to import."""

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.pipelining

with contextlib.suppress(ImportError):
    import deepspeed
    import deepspeed.runtime.zero.stage3  # noqa: F401

import megaseq.train.trainer  # noqa: F401

torch.set_num_threads(1)
