"""The interpreter's arithmetic equals that of torch, bit for bit; on a GPU, the GPU's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.interpreter import kernels

BLOCK = 256
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INFINITY, NAN = float("inf"), float("nan")
SPECIALS = [0.0, -0.0, INFINITY, -INFINITY, NAN, 1.0, -1.0, 448.0, 449.0, 464.0, 465.0, 57344.0, 61440.0]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FP8 = tuple(LARGEST)


def numbers(dtype: torch.dtype, *, device: torch.device, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes, ties, subnormals and specials."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=draw).to(torch.int32)
    anything = bits.view(torch.float32)
    anything[anything.isnan()] = float("nan")  # No signalling ones, of which torch and NumPy think differently.
    middling = torch.randn(4096, generator=draw) * torch.logspace(-8, 5, 4096)[torch.randperm(4096, generator=draw)]
    halves = (torch.randint(-4096, 4096, (2048,), generator=draw).float() + 0.5) / 256
    everything = torch.cat([torch.tensor(SPECIALS), anything, middling, halves])
    return everything.to(dtype).to(device)


def same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal in every bit; one NaN is as good as another."""
    assert found.dtype is expected.dtype
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    kind = INTEGERS[found.element_size()]
    bits = [torch.where(nan, torch.zeros((), dtype=kind, device=nan.device), t.view(kind)) for t in (found, expected)]
    torch.testing.assert_close(bits[0], bits[1], rtol=0, atol=0)


def converted(x: Tensor, *, dtype: torch.dtype, cut: bool = False) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernels.convert[(-(-x.numel() // BLOCK),)](x, y, x.numel(), CUT=cut, BLOCK=BLOCK)
    return y


def saturated(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    largest = LARGEST[dtype]
    return torch.where(x.isnan(), x, x.float().clamp(-largest, largest).to(x.dtype)).to(dtype)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
def test_floats(source: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    x = numbers(source, device=device)
    # Triton goes from bf16 and fp16 to all but fp32 by way of fp32, which changes nothing.
    same_bits(converted(x, dtype=target), x.to(target))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_all_fp8(dtype: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    x = torch.arange(256, dtype=torch.uint8, device=device).view(dtype)
    same_bits(converted(x, dtype=target), x.to(target))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_to_fp8_rounds_to_even_and_saturates(dtype: torch.dtype, source: torch.dtype, device: torch.device) -> None:
    x = numbers(source, device=device)
    found = converted(x, dtype=dtype)
    same_bits(found, saturated(x, dtype=dtype))
    assert found.float()[~x.isnan()].abs().max().item() == LARGEST[dtype]


def test_to_bf16_can_cut(device: torch.device) -> None:
    x = numbers(torch.float32, device=device)
    x = x[x.isfinite()]
    cut = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    same_bits(converted(x, dtype=torch.bfloat16, cut=True), cut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "maximum", "where"])
def test_elementwise(operation: str, dtype: torch.dtype, device: torch.device) -> None:
    a, b, c = (numbers(dtype, device=device, seed=seed) for seed in range(3))
    y = torch.empty_like(a)
    count = a.numel()
    kernels.combine[(-(-count // BLOCK),)](a, b, c, y, count, OPERATION=operation, BLOCK=BLOCK)
    expected = {
        "add": lambda: a + b,
        "subtract": lambda: a - b,
        "multiply": lambda: a * b,
        "maximum": lambda: torch.fmax(a, b),
        "where": lambda: torch.where(a > b, c, -c),
    }[operation]()
    same_bits(y + 0, expected + 0)  # + 0 makes one of the two zeros, which of them a maximum takes is open.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fma_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    a, b, c = (torch.randn(1024, generator=torch.Generator().manual_seed(s)).to(dtype).to(device) for s in range(3))
    y = torch.empty_like(a)
    kernels.combine[(4,)](a, b, c, y, 1024, OPERATION="fma", BLOCK=BLOCK)
    wide = a.double() * b.double() + c.double()
    same_bits(y, wide.to(torch.float32).to(dtype) if dtype is torch.bfloat16 else wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64])
def test_all_bits_are_turned(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([0, 1, 3, 77], device=device).to(dtype)
    y = torch.empty_like(x)
    kernels.complement[(1,)](x, y, BLOCK=4)
    width = 1 if dtype is torch.bool else 8 * x.element_size()
    assert [number % 2**width for number in y.tolist()] == [2**width - 1 - number for number in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, *FP8])
def test_matrix_product(dtype: torch.dtype, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 8, (32, 32), generator=draw).float().to(dtype).to(device) for _ in range(2))
    c = torch.full((32, 32), 3, dtype=torch.int32 if dtype is torch.int8 else torch.float32, device=device)
    kernels.product[(1,)](a, b, c, WIDTH=32, PRECISION="ieee")
    assert torch.equal(c.double(), a.double() @ b.double() + 3)  # Small whole numbers: every order of sums is exact.


def test_tf32_is_told_from_ieee(device: torch.device) -> None:
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)).to(device) for s in range(2))
    exact, found = a.double() @ b.double(), {}
    for precision in ("ieee", "tf32"):
        c = torch.zeros(32, 32, device=device)
        kernels.product[(1,)](a, b, c, WIDTH=32, PRECISION=precision)
        found[precision] = (c - exact).abs().max().item() / exact.abs().max().item()
    assert found["ieee"] < 1e-6 < 1e-5 < found["tf32"] < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(-9, 9, (64,), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    x[37] = 20
    out, running = torch.empty(4, device=device), torch.empty(64, device=device)
    kernels.reduce[(1,)](x, out, running, BLOCK=64)
    assert out.tolist() == [20, x.float().sum().item(), 20, 37]
    assert torch.equal(running, x.float().cumsum(0))  # Whole numbers below 256: exact in bf16.


def test_sums_of_bf16_round_as_they_go(device: torch.device) -> None:
    x = torch.ones(512, dtype=torch.bfloat16, device=device)
    x[0] = 256
    out, running = torch.empty(4, device=device), torch.empty(512, device=device)
    kernels.reduce[(1,)](x, out, running, BLOCK=512)
    assert out[1].item() != 767  # bf16 has no 767.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_atomic_add(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(-4, 5, (500,), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    out = torch.zeros(7, dtype=dtype, device=device)
    kernels.add_up[(2,)](x, out, 500, 7, BLOCK=256)
    expected = torch.zeros(7, device=device).index_add(0, torch.arange(500, device=device) % 7, x.float())
    assert torch.equal(out.float(), expected)  # Whole numbers below 256: exact in bf16.
