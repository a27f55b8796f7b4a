"""Attention's kernels against the reference in float64: outputs and every gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.attention import AttentionMask, RelativeBias, attention, attention_with_log_sum
from megaseq.kernels.attention.bias_table import TABLE_PAD
from megaseq.kernels.attention.cases import CASES, FUSED_CASES, AttentionCase
from megaseq.kernels.checks import KernelError
from megaseq.kernels.dropout import DropoutMask
from tests.kernels.interpreter.poison import untouched_memory


def fewer_programs(case: AttentionCase) -> AttentionCase:
    """The case with as many rows and heads as show what it is about."""
    batch, heads, key_heads = min(case.batch, 3), -(-case.num_heads // 2), -(-case.num_key_heads // 2)
    return dataclasses.replace(case, batch=batch, num_heads=heads, num_key_heads=key_heads)


ALL = [*(fewer_programs(case) for case in CASES if not case.biased), *FUSED_CASES]
BY_NAME = {case.name: case for case in ALL}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
TRITON, REFERENCE = "attention=triton", "attention=reference"


def moved(mask: AttentionMask, *, device: torch.device) -> AttentionMask:
    """The mask on a device."""
    ids = [None if t is None else t.to(device) for t in (mask.query_segment_ids, mask.key_segment_ids)]
    return AttentionMask(query_segment_ids=ids[0], key_segment_ids=ids[1], causal=mask.causal, window=mask.window)


def run(
    case: AttentionCase, *, device: torch.device, dtype: torch.dtype, like: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, log-sum-exp and all gradients of a case, computed in `dtype` from numbers that `like` can hold."""
    tensors = [
        t.detach().to(like or dtype).to(device, dtype).requires_grad_() for t in case.tensors(dtype=torch.float64)
    ]
    bias = case.relative(dtype=torch.promote_types(dtype, torch.float32))
    names = ["query", "key", "value"]
    if bias is not None and bias.table is not None:
        table = bias.table.detach().to(device).requires_grad_()
        bias = RelativeBias(table=table, first=bias.first)
        names, tensors = [*names, "table"], [*tensors, table]
    elif bias is not None and bias.slopes is not None:
        bias = RelativeBias(slopes=bias.slopes.to(device))
    with triton_runtime.override(**case.configs()):
        output, log_sum = attention_with_log_sum(
            tensors[0],
            key=tensors[1],
            value=tensors[2],
            mask=moved(case.mask(), device=device),
            bias=bias,
            scale=case.scale,
            soft_cap=case.soft_cap,
            dropout=case.dropout(),
        )
        weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device).view(output.shape)
        gradients = torch.autograd.grad(output, tensors, grad_outputs=weight.to(dtype))
    return {"output": output, "log_sum": log_sum, **dict(zip(names, gradients, strict=True))}


def check(found: dict[str, Tensor], *, expected: dict[str, Tensor], tolerance: float) -> None:
    """Fails if a tensor is further off than a tolerance, in units of its largest magnitude or 0.1."""
    for name, want in expected.items():
        want, have = want.detach().double(), found[name].detach().double()
        assert have.shape == want.shape, name
        assert torch.equal(have.isinf(), want.isinf()) and not have.isnan().any(), name
        want, have = want.masked_fill(want.isinf(), 0), have.masked_fill(have.isinf(), 0)
        largest, error = ((t.abs().max().item() if t.numel() else 0.0) for t in (want, have - want))
        assert error <= tolerance * max(largest, 0.1), f"{name} is off by {error}, of {largest}"


def compare(case: AttentionCase, *, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the kernels do not compute what the reference does."""
    monkeypatch.setenv("MEGASEQ_KERNELS", REFERENCE)
    expected = run(case, device=device, dtype=torch.float64, like=dtype)
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    check(run(case, device=device, dtype=dtype), expected=expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_equals_reference(case: AttentionCase, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, device=device, dtype=torch.float32, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["table", "grouped", "soft_cap_table", "dropout_beyond_32_bits"])
def test_half_precision_equals_reference(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(BY_NAME[name], device=device, dtype=dtype, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 40)])
def test_lengths_down_to_zero(queries: int, keys: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(
        "", batch=1, query_length=queries, key_length=keys, num_heads=1, num_key_heads=1, table=(-2, 5)
    )
    compare(case, device=device, dtype=torch.float32, monkeypatch=monkeypatch)


def test_padding_on_one_side(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1] * 40, [1] * 33 + [0] * 7, [0] * 40], device=device)
    query, key, value = (
        t.detach().to(device).requires_grad_()
        for t in AttentionCase("", batch=3, query_length=40, key_length=40, num_heads=1, num_key_heads=1).tensors()
    )
    for side in ("query_segment_ids", "key_segment_ids"):
        results = []
        for implementation in (TRITON, REFERENCE):
            monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
            output = attention(query, key=key, value=value, mask=AttentionMask(**{side: ids}))  # type: ignore[arg-type]
            gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
            results.append(dict(zip("oqkv", (output, *gradients), strict=True)))
        check(results[0], expected=results[1], tolerance=1e-5)
        assert (results[0]["o"][2] == 0).all() and (results[0]["q"][2] == 0).all()


@pytest.mark.parametrize("order", ["rising", "any"])
def test_segments_in_any_order(order: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that rise along a row make tiles be skipped; ids that do not are as right."""
    # Runs that fill granules, and runs that do not.
    lengths = torch.tensor([32, 32, 32, 20, 7, 9])
    queries = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 1, 2, 3, 4, 0]])
    keys = queries
    if order == "any":
        queries, keys = torch.tensor([[1, 2, 3, 0, 1, 3], [3, 1, 3, 2, 3, 1]]), torch.tensor([[1, 2, 1, 3, 3, 0]] * 2)
    ids, key_ids = (numbers.repeat_interleave(lengths, dim=1).to(device) for numbers in (queries, keys))
    case = AttentionCase("", query_length=132, key_length=132, num_heads=1, num_key_heads=1, tile=(32, 32))
    query, key, value = (t.detach().to(device).requires_grad_() for t in case.tensors())
    results = []
    for implementation in (TRITON, REFERENCE):
        monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
        with triton_runtime.override(**case.configs()):
            mask = AttentionMask(query_segment_ids=ids, key_segment_ids=key_ids)
            output = attention(query, key=key, value=value, mask=mask)
            gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
        results.append(dict(zip("oqkv", (output, *gradients), strict=True)))
    check(results[0], expected=results[1], tolerance=1e-5)


def test_strided_views_of_a_fused_projection(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 20, 3 * 2, 16, generator=generator).to(device).requires_grad_()
    results = []
    for implementation in (TRITON, REFERENCE):
        monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
        query, key, value = fused.split(2, dim=2)
        output = attention(query, key=key, value=value, mask=AttentionMask(causal=True))
        results.append({"output": output})
        # One gradient comes with every element at the same place, one with its last axis not in a row.
        for name, upstream in (("sum", output.sum()), ("transposed", (output.transpose(1, 3).contiguous() ** 2).sum())):
            results[-1][name] = torch.autograd.grad(upstream, fused, retain_graph=True)[0]
    check(results[0], expected=results[1], tolerance=1e-5)
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    across = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in fused.split(2, dim=2)]
    found = attention(across[0], key=across[1], value=across[2], mask=AttentionMask(causal=True))
    torch.testing.assert_close(found, results[1]["output"], rtol=0, atol=1e-5)


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU has no memory that is only reserved")
    far, length = 2**26, 40
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    with untouched_memory():
        views = [torch.empty(2 * length * far, dtype=torch.float16) for _ in range(3)]
    case = AttentionCase("", query_length=length, key_length=length, num_heads=1, num_key_heads=1)
    near = [t.detach() for t in case.tensors(dtype=torch.float16)]
    results = []
    for strided in (False, True):
        tensors = near
        if strided:
            tensors = [v.as_strided((2, length, 1, 16), (length * far, far, 16, 1)) for v in views]
            for tensor, values in zip(tensors, near, strict=True):
                tensor.copy_(values)
        inputs = [t.detach().requires_grad_() for t in tensors]
        output = attention(inputs[0], key=inputs[1], value=inputs[2])
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for have, want in zip(results[1], results[0], strict=True):
        assert torch.equal(have, want)


def test_dropout_of_rows_that_stand_apart(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the first weights of rows, or of runs of rows, such as those of other ranks' heads lie between."""
    case = AttentionCase("", query_length=20, key_length=33, num_heads=2, num_key_heads=1)
    query, key, value = (t.detach().to(device).requires_grad_() for t in case.tensors())
    for count in (2 * 2 * 20, 2 * 2, 2):
        starts = torch.arange(count, device=device) * (5 * 10**9 + 1) + 2**32 - 300
        results = []
        for implementation in (TRITON, REFERENCE):
            monkeypatch.setenv("MEGASEQ_KERNELS", implementation)
            output = attention(query, key=key, value=value, dropout=DropoutMask(0.4, (3, 2, 1), starts))
            gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
            results.append(dict(zip("oqkv", (output, *gradients), strict=True)))
        check(results[0], expected=results[1], tolerance=1e-5)


def test_parts_of_the_keys_are_joined(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the log-sum-exp, and gradients go back through it."""
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    case = AttentionCase("", query_length=9, key_length=20, num_heads=2, num_key_heads=1)
    inputs = [t.detach().to(device).requires_grad_() for t in case.tensors()]
    query, key, value = inputs
    whole = attention(query, key=key, value=value)
    parts = [attention_with_log_sum(query, key=key[:, run], value=value[:, run]) for run in (slice(8), slice(8, 20))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    joined = sum(out * (log_sum - total).exp().transpose(1, 2)[..., None] for out, log_sum in parts)
    assert isinstance(joined, Tensor)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-5)
    for have, want in zip(
        torch.autograd.grad(joined.square().sum(), inputs),
        torch.autograd.grad(whole.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5)


def test_gradients_are_the_same_in_every_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    first, again = (run(BY_NAME["table_far"], device=device, dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sums_of_a_wide_table_share_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaseq.kernels.attention import triton_launch

    monkeypatch.setattr(triton_launch, "MAX_PARTS", 500)
    compare(BY_NAME["table_packed_causal"], device=device, dtype=torch.float32, monkeypatch=monkeypatch)


@pytest.mark.skipif(not triton_runtime.interpreted(), reason="a GPU runs the instruction itself")
def test_biases_by_the_instruction(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU loads biases by an instruction that the interpreter does not know: from the same addresses."""
    from megaseq.kernels.attention import triton_parts
    from megaseq.kernels.triton_runtime import tl

    loads: list[str] = []

    def instruction(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
        assert (constraints, is_pure, pack) == ("=f,l", True, 1)
        loads.append(text)
        return tl.load(args[0].to(tl.pointer_type(dtype)))

    monkeypatch.setattr(tl, "inline_asm_elementwise", instruction)
    monkeypatch.setattr(triton_parts, "_PTX", tl.constexpr(True))
    for name in ("table_far", "table_packed_causal"):
        compare(BY_NAME[name], device=device, dtype=torch.float32, monkeypatch=monkeypatch)
    assert set(loads) == {"ld.global.nc.f32 $0, [$1];"}


def operator_arguments(device: torch.device) -> tuple[Any, ...]:
    """Arguments of the operator, with everything that it can have a gradient for."""
    case = AttentionCase("", batch=2, query_length=6, key_length=6, num_heads=2, num_key_heads=1, head_dim=16)
    tensors = [t.detach().to(device).requires_grad_() for t in case.tensors()]
    ranges = moved(case.mask(), device=device).ranges(query_length=6, key_length=6)
    assert ranges is not None
    segments = (ranges.query_ids, ranges.key_ids, ranges.key_ranges, ranges.query_ranges)
    table = torch.zeros(2, 5 + 2 * TABLE_PAD, device=device, requires_grad=True)
    return (*tensors, *segments, table, None, None, 0.25, 0.0, 0, -(1 << 30), 0, -2, 0.1, 99, 0)


def test_operator_is_registered_in_full(device: torch.device) -> None:
    torch.library.opcheck(torch.ops.megaseq.attention_forward.default, operator_arguments(device))


def test_compiles_and_exports(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)

    class Block(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, table: Tensor, ids: Tensor) -> Tensor:
            mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True)
            bias = RelativeBias(table=table, first=-3)
            dropout = DropoutMask(0.2, (1, 2, 3))
            return attention(query, key=key, value=value, mask=mask, bias=bias, dropout=dropout)

    case = AttentionCase("", query_length=9, key_length=9, num_heads=2, num_key_heads=1, table=(-3, 4))
    bias = case.relative()
    assert bias is not None and bias.table is not None
    inputs = [t.detach().to(device).requires_grad_() for t in (*case.tensors(), bias.table)]
    ids = torch.tensor([[1] * 4 + [2] * 5, [1] * 6 + [0] * 3], device=device)
    block = Block()
    results = []
    for module in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        output = module(*inputs, ids)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for have, want in zip(results[1], results[0], strict=True):
        assert torch.equal(have, want)
    exported = torch.export.export(block, (*(t.detach() for t in inputs), ids))
    assert torch.equal(exported.module()(*inputs, ids), results[0][0])


def test_what_the_kernels_cannot_do_is_an_error(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", TRITON)
    query, key, value = (t.detach().to(device) for t in AttentionCase("").tensors())
    positions = torch.arange(7, device=device)[None]
    wide = torch.zeros(1, 3, 1, 257, device=device)
    rest: dict[str, Any] = {"key": key, "value": value}
    with pytest.raises(KernelError, match="takes no tensor of the bias of every pair"):
        attention(query, **rest, bias=torch.zeros(1, 4, 7, 7, device=device))
    with pytest.raises(KernelError, match="places in the row for positions"):
        attention(query, **rest, mask=AttentionMask(causal=True, query_positions=positions))
    with pytest.raises(KernelError, match="a scale above 0"):
        attention(query, **rest, scale=-1.0)
    with pytest.raises(KernelError, match=r"float32, bfloat16 or float16, not torch\.float64"):
        attention(query.double(), key=key.double(), value=value.double())
    with pytest.raises(KernelError, match="a width up to 256, not 257"):
        attention(wide, key=wide, value=wide)
    with pytest.raises(KernelError, match="begin at the first key of a query"):
        attention(query, **rest, dropout=DropoutMask(0.1, (1, 2, 3), torch.arange(112, device=device)))
