"""The kernel of `scaled_linear` against float64: formats, blocks, sizes, strides, tiles; what torch asks of an op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megaseq.kernels import dispatch, triton_runtime
from megaseq.kernels.activation.reference import FUNCTIONS
from megaseq.kernels.quantize import Quantized, quantize
from megaseq.kernels.scaled_linear import op, scaled_linear
from megaseq.kernels.scaled_linear.cases import CASES, TOLERANCE, LinearCase
from megaseq.kernels.scaled_linear.configs import configs, narrowed
from megaseq.kernels.scaled_linear.op import triton_scaled_linear
from megaseq.kernels.triton_runtime import Config
from tests.kernels.interpreter.poison import untouched_memory

Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes an implementation the one that runs."""
    return lambda name: monkeypatch.setenv(dispatch.VARIABLE, f"scaled_linear={name}")


def check(
    x: Quantized,
    *,
    weight: Quantized,
    use: Use,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compares the kernel with the reference."""
    results = []
    for name in ("triton", "reference"):
        use(name)
        results.append(scaled_linear(x, weight=weight, bias=bias, activation=activation, dtype=dtype))
    found, expected = results
    assert found.shape == expected.shape and found.dtype is dtype
    torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference(case: LinearCase, device: torch.device, use: Use) -> None:
    x, weight, bias = case.tensors(device=device)
    for dtype in (torch.float32, torch.bfloat16):
        check(x, weight=weight, bias=bias, activation=case.activation, dtype=dtype, use=use)


def test_rows_that_are_not_aligned_have_narrow_tiles() -> None:
    wide = Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128}, 8, 3)
    narrow = Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, 8, 3)
    assert narrowed(wide, aligned=True) is wide and narrowed(wide, aligned=False) == narrow
    narrowest = Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32})
    assert narrowed(narrowest, aligned=False) is narrowest


@pytest.mark.parametrize(("width", "start", "step"), [(256, 0, 128), (250, 0, 64), (256, 3, 64)])
def test_rows_choose_the_step_by_where_they_lie(
    width: int, start: int, step: int, device: torch.device, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(-9, 9, (5, 272), device=device).to(torch.int8)[:, start : start + width]
    weight = torch.randint(-9, 9, (16, 256), device=device).to(torch.int8)[:, :width]
    scales = torch.ones(16, 1, device=device)
    tile = Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "GROUP": 8})
    taken: list[Config] = []
    monkeypatch.setattr(op, "narrowed", lambda tile, aligned: taken.append(narrowed(tile, aligned=aligned)) or taken[0])
    with triton_runtime.override(scaled_linear=tile):
        check(Quantized(values, scales[:5], width), weight=Quantized(weight, scales, width), use=use)
    assert taken[0].blocks["BLOCK_K"] == step


def test_every_activation_and_every_kind_of_bias(device: torch.device, use: Use) -> None:
    x, weight, _ = LinearCase("activations", columns=16).tensors(device=device)
    for index, name in enumerate(FUNCTIONS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
        bias = torch.randn(32, device=device, dtype=dtype)[::2]
        check(x, weight=weight, bias=bias, activation=name, dtype=dtype, use=use)


def test_integers_and_small_floats_are_exact(device: torch.device, use: Use) -> None:
    use("triton")
    x, weight = (torch.randint(-128, 128, (n, 100), device=device).to(torch.int8) for n in (9, 20))
    first, second = (Quantized(values, torch.full((len(values), 1), 0.5, device=device), 100) for values in (x, weight))
    y = scaled_linear(first, weight=second, dtype=torch.float32)
    assert torch.equal(y.cpu(), (x.cpu().long() @ weight.cpu().long().T).float() / 4)
    # Whole numbers to 16, of which e4m3 knows all: sums of their products are exact in fp32.
    x, weight = (torch.randint(-16, 17, (n, 100), device=device) for n in (9, 20))
    first, second = (
        Quantized(values.float().to(torch.float8_e4m3fn), torch.full((len(values), 4), 2.0, device=device), 32)
        for values in (x, weight)
    )
    y = scaled_linear(first, weight=second, dtype=torch.float32)
    assert torch.equal(y.cpu(), (x.cpu() @ weight.cpu().T).float() * 4)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_every_tile_gives_the_same(form, device: torch.device, use: Use) -> None:  # type: ignore[no-untyped-def]
    integer = form == "int8"
    case = LinearCase("tiles", rows=20, width=144, columns=36, form=form, biased=True)
    x, weight, bias = case.tensors(device=device)
    tiles = {str(tile): tile for rows in (16, 32, 64, 128, 256) for tile in configs(rows, integer=integer)}
    # The interpreter knows nothing of warps and stages.
    shapes = tiles if device.type == "cuda" else {str(tile.blocks): tile for tile in tiles.values()}
    for tile in shapes.values():
        with triton_runtime.override(scaled_linear=tile):
            check(x, weight=weight, bias=bias, use=use)


def test_tiles_are_walked_through_in_groups(device: torch.device, use: Use) -> None:
    x, weight, bias = LinearCase("groups", rows=90, width=32, columns=70, biased=True).tensors(device=device)
    for group in (1, 2, 4, 8):
        tile = Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": group})
        with triton_runtime.override(scaled_linear=tile):
            check(x, weight=weight, bias=bias, use=use)


def test_a_tile_that_does_not_divide_the_blocks_is_not_taken(device: torch.device, use: Use) -> None:
    case = LinearCase("blocks", width=192, x_block=96, weight_block=64)
    x, weight, _ = case.tensors(device=device)
    with triton_runtime.override(scaled_linear=configs(16, integer=True)[0]):
        check(x, weight=weight, use=use)


def test_any_strides_and_leading_shape(device: torch.device, use: Use) -> None:
    values = torch.randint(-127, 128, (150, 14), device=device).to(torch.int8)
    scales = torch.rand(2, 14, device=device).t()[::2, :1]
    x, weight = Quantized(values.t()[::2, ::3], scales, 50), Quantized(values.t()[1::2, 2::3], scales, 50)
    check(x, weight=weight, use=use)
    use("triton")
    stacked = quantize(torch.randn(2, 3, 50, device=device))
    y = scaled_linear(stacked, weight=weight)
    assert torch.equal(y[1], scaled_linear(Quantized(*(part[1] for part in stacked[:2]), 50), weight=weight))
    assert scaled_linear(Quantized(stacked.values[:0], stacked.scales[:0], 50), weight=weight).shape == (0, 3, 7)


def test_more_than_two_to_the_31_elements_apart(device: torch.device, use: Use) -> None:
    stride = 2**30 + 7
    with untouched_memory():
        memory = torch.empty(3 * stride + 60, dtype=torch.int8, device=device)
    ones = torch.ones(4, 1, device=device)
    far = memory.as_strided((4, 33), (stride, 1))
    far.copy_(torch.randint(-127, 128, (4, 33)))
    near = Quantized(far.contiguous(), ones, 33)
    check(Quantized(far, ones, 33), weight=near, use=use)
    check(near, weight=Quantized(far, ones, 33), use=use)


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    x, weight, bias = LinearCase("op", biased=True).tensors(device=device)
    torch.library.opcheck(triton_scaled_linear, (*x, *weight, bias, "relu", torch.bfloat16))


def test_compilation_and_export(device: torch.device, use: Use) -> None:
    weight = quantize(torch.randn(6, 32, device=device), form="e4m3")

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scaled_linear(quantize(x, form="e4m3"), weight=weight, activation="silu")

    use("triton")
    x = torch.randn(5, 32, device=device)
    expected = Module()(x)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(x), expected)
    sizes = {"x": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(Module(), (x,), dynamic_shapes=sizes)
    assert "megaseq.scaled_linear" in str(exported.graph)
    assert torch.equal(exported.module()(x[:3]), expected[:3])
