"""Launches the kernels: into how many chunks the vocabulary goes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.beam_step import configs
from megaseq.kernels.beam_step.rule import BeamStep, StepRule
from megaseq.kernels.beam_step.triton_kernels import best_of_chunks, merge_chunks

PROGRAMS_PER_PROCESSOR = 8
"""Programs that keep a processor's memory pipeline full."""
BITS_BELOW = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Bits of fp32 that a dtype does not have."""


@triton_runtime.on_its_device
def triton_beam_step(
    logits: Tensor,
    *,
    total: Tensor,
    rule: StepRule,
    forbid_eos: Tensor | None,
    normalised: bool,
    num_chunks: int | None = None,
) -> BeamStep:
    """`beam_step` by Triton; see there. `num_chunks` of the vocabulary, about; None: as many as fill the GPU."""
    (batch, num_hyps), vocab, device = total.shape, logits.shape[1], logits.device
    rows, count = batch * num_hyps, min(rule.count, vocab)
    keep = min(count + 1, vocab)
    key = f"{triton_runtime.kind_of(logits.dtype)},count={count},{configs.crowd(rows)}"
    config = triton_runtime.config("beam_step", key=key, default=configs.DEFAULT)
    tiles = -(-vocab // config.blocks["BLOCK"])
    hyps = _power(num_hyps)
    if num_chunks is None:
        num_chunks = -(-PROGRAMS_PER_PROCESSOR * _processors(device) // max(1, rows))
    most = configs.MERGE_ELEMENTS // hyps
    num_chunks = max(1, min(num_chunks, tiles, most // keep))
    tiles_per_chunk = -(-tiles // num_chunks)
    num_chunks = -(-tiles // tiles_per_chunk)
    chunks = class_of(num_chunks)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    step = BeamStep(
        score=new(batch, num_hyps, count, dtype=torch.float32),
        ids=new(batch, num_hyps, count, dtype=torch.int64),
        eos_score=new(batch, num_hyps, dtype=torch.float32),
        eos_allowed=new(batch, num_hyps, dtype=torch.bool),
        next_score=new(batch, rule.size, dtype=torch.float32),
        next_parents=new(batch, rule.size, dtype=torch.int64),
        next_ids=new(batch, rule.size, dtype=torch.int64),
    )
    if rows == 0:
        return step
    tops, sums = (new(rows, num_chunks, dtype=torch.float32) for _ in range(2))
    lows = new(rows, num_chunks, dtype=torch.int64)
    keys = new(rows, num_chunks, keep, dtype=torch.int64)
    forbidden = total if forbid_eos is None else forbid_eos
    forbid_stride = 0 if forbid_eos is None else forbid_eos.stride(0)
    best_of_chunks[(num_chunks * rows,)](
        logits, forbidden, tops, sums, lows, keys, vocab, *logits.stride(), rule.eos_id, num_hyps, keep, num_chunks,
        tiles, tiles_per_chunk, forbid_stride, NORMALISED=normalised, FORBID=forbid_eos is not None, TOP=_power(keep),
        **config.arguments(),
    )  # fmt: skip
    merging = triton_runtime.config("beam_step_merge", key=f"hyps={hyps}", default=configs.merging(hyps))
    merge_chunks[(batch,)](
        logits, forbidden, tops, sums, lows, keys, total, *step,
        vocab, *logits.stride(), rule.eos_id, num_hyps, count, rule.size, keep, num_chunks,
        rule.max_logit_delta, rule.local_threshold, *total.stride(), forbid_stride,
        NORMALISED=normalised, FORBID=forbid_eos is not None, STEP=1 << BITS_BELOW[logits.dtype],
        HYPS=hyps, CHUNKS=chunks, CANDIDATES=min(_power(chunks * keep), most), COUNT=_power(count),
        BLOCK=config.blocks["BLOCK"], **merging.arguments(),
    )  # fmt: skip
    return step


def class_of(num_chunks: int) -> int:
    """The next of 2, 8, 32, 128, ...: each is compiled, and the chunks of a batch that shrinks have any number."""
    size = 2
    while size < num_chunks:
        size *= 4
    return size


def _power(number: int) -> int:
    """The next power of 2, at least `number`."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; elsewhere nothing runs at the same time."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
