"""Imported once by the server from which rank processes are forked: what costs seconds to import."""

import contextlib
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.pipelining

for _name in (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "setuptools",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

import megaseq.train.trainer  # noqa: E402
import megaseq.train.updaters.zero  # noqa: E402, F401

torch.set_num_threads(1)
