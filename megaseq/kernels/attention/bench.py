"""What `megaseq bench kernels` proves and times of attention: forward and backward pass of training steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels import triton_runtime
from megaseq.kernels.attention import AttentionMask, RelativeBias, attention
from megaseq.kernels.attention.configs import FORWARD, OF_KEY, OF_QUERY, candidates
from megaseq.kernels.attention.reference import reference_attention
from megaseq.kernels.bench.passes import TOLERANCE
from megaseq.kernels.bench.proof import forced
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed, proof_dtype
from megaseq.kernels.dropout import DropoutMask
from megaseq.kernels.triton_runtime import Config

MAX_DISTANCE = 128
"""T5's: pairs further apart share a bias."""
FORWARD_AND_BACKWARD = 3.5
"""Matrix products of both passes, in those of the forward pass: that has 2, and the backward pass 5."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of a model in training."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int = 16
    head_dim: int = 64
    causal: bool = False
    biased: bool = False
    """With T5's bias, which is trained."""
    segments: int = 1
    """Of equal length in each row."""
    rate: float = 0.0
    """Chance that a weight is dropped."""
    dtype: torch.dtype = torch.bfloat16

    def small(self, *, on_gpu: bool = False) -> Shape:
        """The same kind of call, with sizes for a proof: on a GPU those for which it compiles the same kernels."""
        if on_gpu:
            return dataclasses.replace(self, batch=2 if max(self.queries, self.keys) < 2048 else 1)
        queries = min(self.queries, 90)
        keys = queries if self.keys == self.queries else 70
        return dataclasses.replace(self, batch=2, queries=queries, keys=keys, heads=2)

    def mask(self, device: torch.device) -> AttentionMask | None:
        """Who sees whom."""
        if self.segments == 1:
            return AttentionMask(causal=True) if self.causal else None
        queries, keys = (self._segment_ids(length, device=device) for length in (self.queries, self.keys))
        return AttentionMask(query_segment_ids=queries, key_segment_ids=keys, causal=self.causal)

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Query, key, value, which want gradients, and with a bias its table [N, W], which does too."""
        dtype = proof_dtype(self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.batch, self.queries), (self.batch, self.keys), (self.batch, self.keys)]
        sizes: list[tuple[int, ...]] = [(*shape, self.heads, self.head_dim) for shape in shapes]
        if self.biased:
            sizes.append((self.heads, -self.first + (1 if self.causal else MAX_DISTANCE + 1)))
        return [torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_() for size in sizes]

    @property
    def dropout(self) -> DropoutMask | None:
        """Which weights are dropped."""
        return DropoutMask(self.rate, (7, 11, 13)) if self.rate else None

    @property
    def first(self) -> int:
        """Distance of the table's first column."""
        return -MAX_DISTANCE

    @property
    def flops(self) -> float:
        """Of both passes; of the pairs that see each other."""
        pairs = self.batch * self.queries * self.keys / self.segments * (0.5 if self.causal else 1.0)
        return FORWARD_AND_BACKWARD * 4 * pairs * self.heads * self.head_dim

    def _segment_ids(self, length: int, *, device: torch.device) -> Tensor:
        places = torch.arange(length, device=device) * self.segments // length
        return (places + 1).expand(self.batch, length).contiguous()


SHAPES = (
    # What training runs: T5 and Transformer-big drop weights out.
    Shape("t5_large_encoder_512_dropout", 32, 512, 512, biased=True, rate=0.1),
    Shape("t5_large_encoder_512", 32, 512, 512, biased=True),
    Shape("transformer_big_encoder_packed_dropout", 16, 512, 512, segments=16, rate=0.1),
    Shape("t5_large_cross_128_512", 32, 128, 512),
    Shape("head_128_causal_2048", 4, 2048, 2048, head_dim=128, causal=True),
    Shape("t5_large_encoder_2048", 8, 2048, 2048, biased=True),
    Shape("t5_large_encoder_2048_packed", 8, 2048, 2048, biased=True, segments=8),
    Shape("t5_large_encoder_512_packed", 32, 512, 512, biased=True, segments=4),
    Shape("t5_large_decoder_128", 32, 128, 128, biased=True, causal=True),
    Shape("t5_large_decoder_512", 8, 512, 512, biased=True, causal=True),
    Shape("t5_large_decoder_512_dropout", 8, 512, 512, biased=True, causal=True, rate=0.1),
    Shape("t5_large_cross_512_2048_packed", 8, 512, 2048, segments=8),
    Shape("t5_xl_encoder_512", 16, 512, 512, heads=32, biased=True),
    Shape("t5_xl_encoder_2048", 4, 2048, 2048, heads=32, biased=True),
    Shape("t5_xl_decoder_512", 4, 512, 512, heads=32, biased=True, causal=True),
    Shape("transformer_big_encoder_packed", 16, 512, 512, segments=16),
    Shape("transformer_big_decoder_packed", 16, 512, 512, segments=16, causal=True),
    Shape("transformer_big_decoder_dropout", 16, 128, 128, causal=True, rate=0.1),
    Shape("head_128_biased_dropout_512", 16, 512, 512, head_dim=128, biased=True, rate=0.1),
    Shape("head_128_biased_512", 16, 512, 512, head_dim=128, biased=True),
    Shape("t5_large_encoder_512_fp16", 32, 512, 512, biased=True, dtype=torch.float16),
    Shape("t5_large_encoder_512_fp32", 8, 512, 512, biased=True, dtype=torch.float32),
)
"""The first one of each key of the tables decides on its tiles."""
GOALS = {"flex_attention": 1.5, "sdpa_with_bias": 2.0, "flash_without_bias": 0.8, "segments_apart": 1 / 1.15}
"""By peer: how many times as long it should take. Segments apart: packing may cost 15 %."""


def bench_cases() -> list[BenchCase]:
    """All shapes, those first whose tile sizes count most."""
    known = triton_runtime.interpreted() or torch.cuda.is_available()
    arch = triton_runtime.architecture() if known else 0
    return [
        BenchCase(
            "attention",
            shape.name,
            check=functools.partial(compare, shape),
            prepare=functools.partial(prepare, shape),
            candidates=_candidates(shape, arch=arch),
        )
        for shape in SHAPES
    ]


def compare(shape: Shape, device: torch.device) -> dict[str, Comparison]:
    """Output and gradients beside those of the reference in float64."""
    shape = shape.small(on_gpu=device.type == "cuda")
    tensors = shape.tensors(device)
    dtype = tensors[0].dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    mask = shape.mask(device)
    found = _call(shape, tensors=tensors, mask=mask)
    bias = _bias(shape, tensors=exact)
    dense = None if bias is None else bias.dense(query_length=shape.queries, key_length=shape.keys)
    allowed = None if mask is None else mask.allowed(query_length=shape.queries, key_length=shape.keys, device=device)
    scale = shape.head_dim**-0.5
    query, key, value = exact[:3]
    expected = reference_attention(
        query,
        key=key,
        value=value,
        allowed=allowed,
        bias=dense,
        scale=scale,
        soft_cap=None,
        dropout_mask=shape.dropout,
    )
    gradient = torch.linspace(-1, 1, expected.numel(), device=device, dtype=torch.float64).view(expected.shape)
    names = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of table")
    ours = [found, *torch.autograd.grad(found, tensors, gradient.to(dtype))]
    theirs = [expected, *torch.autograd.grad(expected, exact, gradient)]
    tolerance = TOLERANCE[dtype]
    return {n: Comparison(a, b, tolerance) for n, a, b in zip(names, ours, theirs, strict=False)}


def prepare(shape: Shape, device: torch.device) -> Timed:
    """Tensors of full size, in bf16, and what does the same with them."""
    tensors = shape.tensors(device)
    mask = shape.mask(device)
    flash = functools.partial(_flash, shape, tensors=tensors)
    flex = functools.partial(_flex, shape, tensors=tensors)
    peers: dict[str, Callable[[], Callable[[], object]]] = {}
    if shape.segments > 1:
        # Flash does the full rows, and is no measure.
        peers["segments_apart"] = functools.partial(_apart, shape, device=device)
    elif shape.dtype is not torch.float32:
        peers["flash_without_bias"] = flash
    if shape.biased:
        peers["sdpa_with_bias"] = functools.partial(_with_bias, shape, tensors=tensors, mask=mask)
    # It takes longest to compile, and so comes last; it has no dropout.
    if (shape.biased or shape.segments > 1) and not shape.rate:
        peers["flex_attention"] = flex
    goals = {name: GOALS[name] for name in peers}
    run = _trained(lambda: _call(shape, tensors=tensors, mask=mask), inputs=tensors)
    return Timed(run, peers=peers, flops=shape.flops, goals=goals)


def _bias(shape: Shape, *, tensors: Sequence[Tensor]) -> RelativeBias | None:
    return RelativeBias(table=tensors[3], first=shape.first) if shape.biased else None


def _call(shape: Shape, *, tensors: Sequence[Tensor], mask: AttentionMask | None) -> Tensor:
    query, key, value = tensors[:3]
    bias = _bias(shape, tensors=tensors)
    return attention(query, key=key, value=value, mask=mask, bias=bias, dropout=shape.dropout)


def _trained(forward: Callable[[], Tensor], *, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Both passes."""

    def run() -> object:
        output = forward()
        return torch.autograd.grad(output, inputs, output.detach())

    return run


def _heads_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Query, key and value as [B, N, length, H], contiguous, as torch's attention likes them."""
    return [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in tensors[:3]]


def _flash(shape: Shape, *, tensors: Sequence[Tensor]) -> Callable[[], object]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = inputs = _heads_first(tensors)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(
                query, key, value, is_causal=shape.causal, dropout_p=shape.rate
            )

    return _trained(forward, inputs=inputs)


def _with_bias(shape: Shape, *, tensors: Sequence[Tensor], mask: AttentionMask | None) -> Callable[[], object]:
    """The bias of every pair in memory, made once for all layers; its gradient is made for each."""
    query, key, value = inputs = _heads_first(tensors)
    bias = _bias(shape, tensors=[tensor.detach() for tensor in tensors])
    if bias is None:
        raise ValueError(f"{shape.name} has no bias")
    dense = bias.dense(query_length=shape.queries, key_length=shape.keys)
    if mask is not None:
        hidden = mask.additive(dense.dtype, query_length=shape.queries, key_length=shape.keys, device=dense.device)
        dense = dense + hidden
    dense = dense.contiguous().requires_grad_()
    attend = functional.scaled_dot_product_attention
    forward = functools.partial(attend, query, key, value, attn_mask=dense, dropout_p=shape.rate)
    return _trained(forward, inputs=[*inputs, dense])


def _flex(shape: Shape, *, tensors: Sequence[Tensor]) -> Callable[[], object]:
    """FlexAttention, compiled, which captures the table and trains it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = inputs = _heads_first(tensors)
    table = tensors[3].detach().clone().requires_grad_() if shape.biased else None
    if table is not None:
        inputs.append(table)
    ids = [shape._segment_ids(length, device=query.device) for length in (shape.queries, shape.keys)]
    last = shape.first + (0 if table is None else table.shape[1]) - 1

    def _biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if table is None else score + table[h, (k - q).clamp(shape.first, last) - shape.first]

    def _seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = ids[0][b, q] == ids[1][b, k]
        return same & (q >= k) if shape.causal else same

    masked = shape.causal or shape.segments > 1
    blocks = None
    if masked:
        blocks = create_block_mask(_seen, shape.batch, None, shape.queries, shape.keys, device=query.device.type)
    # What was compiled for other shapes would make it compile for shapes of any size, which is slower.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    modified = None if table is None else _biased

    def forward() -> Tensor:
        output: Tensor = compiled(query, key, value, score_mod=modified, block_mask=blocks)
        return output

    return _trained(forward, inputs=inputs)


def _apart(shape: Shape, *, device: torch.device) -> Callable[[], object]:
    """Our kernels on the segments as rows of their own."""
    apart = dataclasses.replace(
        shape,
        batch=shape.batch * shape.segments,
        queries=shape.queries // shape.segments,
        keys=shape.keys // shape.segments,
        segments=1,
    )
    tensors, mask = apart.tensors(device), apart.mask(device)
    run = _trained(lambda: _call(apart, tensors=tensors, mask=mask), inputs=tensors)

    def with_kernels() -> object:
        with forced("attention"):
            return run()

    return with_kernels


def _candidates(shape: Shape, *, arch: int) -> dict[str, Sequence[Config]]:
    shared = triton_runtime.shared_memory() if arch else 0
    return {
        kernel: candidates(kernel, dtype=shape.dtype, head=shape.head_dim, bias=shape.biased, arch=arch, shared=shared)
        for kernel in (FORWARD, OF_QUERY, OF_KEY)
    }
