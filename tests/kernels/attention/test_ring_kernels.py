"""Ring attention by the kernels against the same in plain torch and float64."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.kernels.attention import op
from megaseq.kernels.attention.ring import RingDropout, RingSettings, chunks_of, ring_attention
from megaseq.kernels.checks import KernelError

from .test_ring import CASES, KEY, Alone
from .test_triton import check

BATCH, LENGTH, WIDTH, HEADS = 2, 72, 16, 2
TRITON, REFERENCE = "attention=triton", "attention=reference"


class Member:
    """One of several threads in a circle."""

    def __init__(self, index: int, *, mailboxes: list[queue.Queue[list[Tensor]]]) -> None:
        self.index, self.size = index, len(mailboxes)
        self._mailboxes = mailboxes

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """To the next one."""
        self._mailboxes[(self.index + 1) % self.size].put([tensor.clone() for tensor in tensors])
        return lambda: self._mailboxes[self.index].get(timeout=300)


def segments() -> Tensor:
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    ids[0, 30:50], ids[0, 50:] = 2, 0
    return ids


def settings_of(name: str, *, ring: Any, device: torch.device) -> RingSettings:
    case, dropout = CASES[name], None
    if case.get("rate"):
        rows = torch.arange(BATCH, device=device)
        dropout = RingDropout(case["rate"], KEY, rows, (0, HEADS), (LENGTH, LENGTH))
    ids = segments().to(device)
    window = None if case.get("window") is None else 20
    return RingSettings(ring, ids, ids, case["causal"], window, 0.3, case.get("soft_cap"), dropout)


def inputs_of(name: str, *, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key, value and, where there is one, the bias."""
    generator = torch.Generator().manual_seed(0)
    key_heads = 1 if "key_heads" in CASES[name] else HEADS
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    if CASES[name].get("biased"):
        shapes.append((HEADS, 2 * LENGTH - 1))
    made = [torch.randn(shape, generator=generator).to(torch.bfloat16).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def run(inputs: list[Tensor], *, settings: RingSettings) -> dict[str, Tensor]:
    """The output and all gradients."""
    bias = inputs[3] if len(inputs) > 3 else None
    output = ring_attention(inputs[0], key=inputs[1], value=inputs[2], bias=bias, settings=settings)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    names = ["query", "key", "value", "bias"][: len(inputs)]
    gradients = torch.autograd.grad(output, inputs, upstream)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_process(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both chunks of the only process: each query is put together from two tiles."""
    settings = settings_of(name, ring=Alone(), device=device)
    monkeypatch.setenv("MEGASEQ_KERNELS", REFERENCE)
    expected = run(inputs_of(name, dtype=torch.float64, device=device), settings=settings)
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    found = run(inputs_of(name, dtype=torch.float32, device=device), settings=settings)
    check(found, expected=expected, tolerance=1e-5)
    assert len(settings.ranges) == (3 if CASES[name]["causal"] else 4)


def test_half_precision(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("biased", ring=Alone(), device=device)
    monkeypatch.setenv("MEGASEQ_KERNELS", REFERENCE)
    expected = run(inputs_of("biased", dtype=torch.float64, device=device), settings=settings)
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    found = run(inputs_of("biased", dtype=torch.bfloat16, device=device), settings=settings)
    assert all(tensor.dtype is torch.bfloat16 for tensor in found.values())
    check(found, expected=expected, tolerance=2e-2)


def shared(tensor: Tensor, *, index: int, size: int) -> Tensor:
    """A process's two chunks of [B, T, ...]."""
    chunks = tensor.detach().chunk(2 * size, dim=1)
    return torch.cat([chunks[number] for number in chunks_of(index, size=size)], dim=1).requires_grad_()


@pytest.mark.parametrize("name", ["biased", "dropped", "grouped"])
def test_two_processes(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and their gradients travel; together the two give what one gives."""
    whole = settings_of(name, ring=Alone(), device=device)
    monkeypatch.setenv("MEGASEQ_KERNELS", REFERENCE)
    exact = inputs_of(name, dtype=torch.float64, device=device)
    one = inputs_of(name, dtype=torch.float32, device=device)
    order = [
        place for index in range(2) for part in chunks_of(index, size=2) for place in range(18 * part, 18 * part + 18)
    ]
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(one[0].shape, generator=generator).to(device)
    bias = exact[3] if len(exact) > 3 else None
    output = ring_attention(exact[0], key=exact[1], value=exact[2], bias=bias, settings=whole)
    gradients = torch.autograd.grad(output, exact, upstream.double())
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    # The interpreter runs one kernel at a time.
    lock = threading.Lock()
    for kernel in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(op, kernel, _locked(getattr(op, kernel), lock=lock))
    mailboxes: list[queue.Queue[list[Tensor]]] = [queue.Queue() for _ in range(2)]
    results: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        settings = dataclasses.replace(whole, ring=Member(index, mailboxes=mailboxes), ranges={})
        own = [shared(tensor, index=index, size=2) for tensor in one[:3]]
        table = one[3].detach().clone().requires_grad_() if len(one) > 3 else None
        leaves = own if table is None else [*own, table]
        got = ring_attention(own[0], key=own[1], value=own[2], bias=table, settings=settings)
        given = torch.autograd.grad(got, leaves, shared(upstream, index=index, size=2).detach())
        results[index] = [got.detach(), *given]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    together = [torch.cat(pair, dim=1) for pair in zip(*(results[index][:4] for index in range(2)), strict=True)]
    names = ["output", "query", "key", "value"]
    found = dict(zip(names, together, strict=True))
    expected = {name: t[:, order] for name, t in zip(names, [output.detach(), *gradients[:3]], strict=True)}
    if bias is not None:
        found["bias"], expected["bias"] = results[0][4] + results[1][4], gradients[3]
    check(found, expected=expected, tolerance=1e-5)


def _locked(function: Callable[..., Any], *, lock: threading.Lock) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with lock:
            return function(*args)

    return call


def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("causal", ring=Alone(), device=torch.device("cpu"))
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    inputs = inputs_of("causal", dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(KernelError, match="attention: MEGASEQ_KERNELS must name an implementation that can run"):
        run(inputs, settings=settings)
