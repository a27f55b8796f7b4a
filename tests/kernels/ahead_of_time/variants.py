"""Counts how many times kernels would be compiled: launches are looked at as Triton does, and nothing is compiled.

`python -m tests.kernels.ahead_of_time.variants` prints, as JSON, the number for each kernel while a batch of beam
search shrinks and its caches grow.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megaseq.kernels.beam_step import launch as beam_step
from megaseq.kernels.beam_step.rule import StepRule
from megaseq.kernels.decode_attention import KeyValueCache
from megaseq.kernels.decode_attention import launch as decode_attention
from tests.kernels.ahead_of_time.driver import CompilingDriver

PROCESSORS = 132
"""Of an H200."""


@contextlib.contextmanager
def counted(architecture: int) -> Iterator[dict[str, set[str]]]:
    """While it is open, kernels do not run; the dict that it gives collects what they would be compiled for."""
    found: dict[str, set[str]] = {}

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = fn.device_caches[0]
        _, specialization, options = binder(*args, **kwargs)
        found.setdefault(fn.__name__, set()).add(f"{specialization} {options}")

    before = driver._active
    driver.set_active(CompilingDriver(architecture))
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield found
    finally:
        driver._active = before


def search(batch: int) -> None:
    """The step of a beam of 4."""
    logits, total = torch.empty(4 * batch, 32128, dtype=torch.bfloat16), torch.empty(batch, 4)
    rule = StepRule(1, 5, 4, max_logit_delta=5.0, local_threshold=-100.0)
    beam_step.triton_beam_step(logits, total=total, rule=rule, forbid_eos=None, normalised=False)


def attend(batch: int, *, tokens: int) -> None:
    """Self-attention by a table of places with a bias, and attention to the sources, of a beam of 4."""
    query = torch.empty(batch, 4, 8, 64, dtype=torch.bfloat16)
    capacity = 32 << max(0, (tokens - 1).bit_length() - 5)
    table = torch.empty(batch, 4, capacity, dtype=torch.int64)
    entries = torch.empty(4096, 1, 2, 8, 64, dtype=torch.bfloat16)
    own = KeyValueCache(*entries.unbind(2), table)
    lengths = torch.full((batch, 4), tokens)
    shared = {"scale": 1.0, "soft_cap": None, "window": None}
    bias = torch.empty(8, tokens, dtype=torch.bfloat16)
    decode_attention.triton_decode_attention(query, cache=own, lengths=lengths, bias=bias, **shared)  # type: ignore[arg-type]
    for length in (37, 48):
        key = torch.empty(1, length, 8, 64, dtype=torch.bfloat16).expand(batch, length, 8, 64)
        decode_attention.triton_decode_attention(
            query,
            cache=KeyValueCache(key, key),
            lengths=lengths[:, 0],
            bias=None,
            **shared,  # type: ignore[arg-type]
        )


def main() -> int:
    """Decodes, as far as launches go."""
    with (
        counted(90) as found,
        mock.patch.object(beam_step, "_processors", lambda _: PROCESSORS),
        mock.patch.object(decode_attention, "_processors", lambda _: PROCESSORS),
    ):
        for batch in range(256, 0, -1):
            search(batch)
            attend(batch, tokens=257 - batch)
    print(json.dumps({name: len(keys) for name, keys in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
