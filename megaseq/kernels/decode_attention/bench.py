"""What `megaseq bench kernels` proves and times of attention while decoding: beams of 4, one source to very many."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype, ready
from megaseq.kernels.decode_attention import KeyValueCache, decode_attention
from megaseq.kernels.decode_attention.cases import TOLERANCE
from megaseq.kernels.decode_attention.configs import configs
from megaseq.kernels.decode_attention.reference import reference_decode_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step of one layer: 4 hypotheses of each source, bf16."""

    name: str
    batch: int
    length: int
    num_heads: int = 16
    head_dim: int = 64
    num_hyps: int = 4
    own: bool = False
    """Self-attention to places of each hypothesis; otherwise cross-attention to a source."""
    biased: bool = False

    def small(self) -> Shape:
        """Sizes for a proof."""
        return dataclasses.replace(self, batch=2, length=37, num_heads=2)

    def tensors(self, device: torch.device) -> tuple[Tensor, KeyValueCache, Tensor | None]:
        """Query [B, K, N, H], cache, and bias [N, S] or None."""
        dtype = proof_dtype(torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        query = normal(self.batch, self.num_hyps, self.num_heads, self.head_dim)
        pages = self.batch * self.num_hyps * self.length if self.own else self.batch
        shape = (pages, 1 if self.own else self.length, self.num_heads, self.head_dim)
        table = None
        if self.own:
            # A beam's hypotheses have common ancestors: each step's places are those of some of them.
            first = torch.arange(0, pages, self.num_hyps * self.length, device=device).view(-1, 1, 1)
            steps = torch.arange(0, self.num_hyps * self.length, self.num_hyps, device=device)
            chosen = torch.randint(
                self.num_hyps, (self.batch, self.num_hyps, self.length), generator=generator, device=device
            )
            table = first + steps + chosen
        bias = normal(self.num_heads, self.length).float() if self.biased else None
        return query, KeyValueCache(normal(*shape), normal(*shape), table), bias

    def lengths(self, device: torch.device) -> Tensor:
        """Keys of each source [B]."""
        return torch.full((self.batch,), self.length, device=device)

    @property
    def moved(self) -> int:
        """Bytes of keys and values that a step must read; those of common ancestors count for each hypothesis."""
        rows = self.batch * (self.num_hyps if self.own else 1)
        return 2 * 2 * rows * self.length * self.num_heads * self.head_dim


SHAPES = tuple(
    shape
    for batch in (1, 32, 256)
    for shape in (
        Shape(f"t5_large_self_128_batch_{batch}", batch, 128, own=True, biased=True),
        Shape(f"t5_large_cross_512_batch_{batch}", batch, 512),
        Shape(f"transformer_big_self_64_batch_{batch}", batch, 64, own=True),
        Shape(f"transformer_big_cross_64_batch_{batch}", batch, 64),
    )
)


def bench_cases() -> list[BenchCase]:
    """All shapes."""
    return [
        BenchCase(
            "decode_attention",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates={
                "decode_attention": configs(rows=1 if shape.own else shape.num_hyps, width=shape.head_dim, itemsize=2)
            },
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """The output beside the reference in float64; on a GPU of full size, as tiles depend on the number of rows."""
    shape = shape if device.type == "cuda" else shape.small()
    query, cache, bias = shape.tensors(device)
    lengths = shape.lengths(device)
    exact = dataclasses.replace(cache, key=cache.key.double(), value=cache.value.double())
    found = decode_attention(query, cache=cache, lengths=lengths, bias=bias)
    expected = reference_decode_attention(
        query.double(),
        cache=exact,
        lengths=lengths,
        bias=bias,
        scale=shape.head_dim**-0.5,
        soft_cap=None,
        window=None,
    )
    return {"output": Comparison(found, expected, TOLERANCE[query.dtype])}


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size; on the host of a small one."""
    shape = shape if device.type == "cuda" else shape.small()
    query, cache, bias = shape.tensors(device)
    run = functools.partial(decode_attention, query, cache=cache, lengths=shape.lengths(device), bias=bias)
    if cache.table is None:
        peers = {"sdpa": ready(functools.partial(_fused, query, cache.key, cache.value))}
    else:
        peers = {"sdpa_gathered": ready(functools.partial(_gathered, query, cache, bias))}
    return Timed(run, peers=peers, bytes=shape.moved, goals={name: 1.0 for name in peers})


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The hypotheses as places of one query [B, K, N, H], keys [B, S, N, H]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _gathered(query: Tensor, cache: KeyValueCache, bias: Tensor | None) -> Tensor:
    """A cache whose keys are brought together for each hypothesis, as after a reorder."""
    assert cache.table is not None
    places = cache.table.flatten(0, 1)
    mask = None if bias is None else bias[None, :, None].to(query.dtype)
    key, value = (entries[:, 0][places].transpose(1, 2) for entries in (cache.key, cache.value))
    heads = functional.scaled_dot_product_attention(query.flatten(0, 1).unsqueeze(2), key, value, attn_mask=mask)
    return heads.view(query.shape)
