"""The kernels of `quantize`: the reference's bits, whatever the sizes, strides and tiles; what torch asks of an op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaseq.kernels import dispatch, triton_runtime
from megaseq.kernels.quantize import dequantize, fake_quantize, quantize
from megaseq.kernels.quantize.cases import CASES, QuantizeCase
from megaseq.kernels.quantize.configs import configs, dequantize_configs
from megaseq.kernels.quantize.op import triton_dequantize, triton_fake_quantize, triton_quantize
from megaseq.kernels.triton_runtime import Config
from tests.kernels.interpreter.poison import untouched_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes an implementation the one that runs."""
    return lambda name: monkeypatch.setenv(dispatch.VARIABLE, f"quantize={name}")


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether the bits are the same, but for those of NaNs."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.float().nan_to_num(0.0), expected.float().nan_to_num(0.0)
    )


def check(x: Tensor, *, case: QuantizeCase, use) -> None:  # type: ignore[no-untyped-def]
    """Compares everything that is made of `x`."""
    results = []
    for name in ("triton", "reference"):
        use(name)
        settings = {"form": case.form, "block": case.block, "power_of_two": case.power_of_two}
        quantized = quantize(x, **settings)
        back = dequantize(quantized, dtype=x.dtype)
        results.append((quantized.values, quantized.scales, back, fake_quantize(x, **settings)))
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype is expected.dtype and found.is_contiguous()
        assert equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_references_bits(case: QuantizeCase, dtype: torch.dtype, device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    check(case.tensor(dtype=dtype).to(device), case=case, use=use)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_zeros_infinities_and_extremes(form, device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(9, 40, device=device)
    x[0] = 0.0
    x[1, 3], x[2, 39], x[3, 16] = math.nan, math.inf, -math.inf
    x[4] *= 2.0**-140
    x[5] = torch.finfo(torch.float32).max / 2
    x[6, :16] = -0.0
    # Ties, and numbers beside the last step.
    x[7, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5, 126.5, 63.5])
    x[8] = 448.0 * torch.linspace(-1, 1, 40)
    for power_of_two in (False, True):
        case = QuantizeCase("extremes", form=form, block=16, power_of_two=power_of_two)
        check(x, case=case, use=use)


@pytest.mark.parametrize("block", [None, 24])
def test_any_strides_and_narrow_tiles(block: int | None, device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(6, 5, 50, device=device)
    views = (x.transpose(0, 2), x[::2, :, 3:49:2], x[0, 0], x[:, :1].expand(6, 5, 50), x[:0])
    case = QuantizeCase("strided", block=block)
    # Blocks wider than the tile are read twice.
    with triton_runtime.override(
        quantize=Config({"ROWS": 8, "COLUMNS": 16}), dequantize=Config({"ROWS": 8, "COLUMNS": 16})
    ):
        for view in views:
            check(view, case=case, use=use)


def test_every_tile_gives_the_same(device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, 600, device=device)
    case = QuantizeCase("tiles", block=512, form="e4m3")
    # Warps mean nothing to the interpreter.
    for tile in configs(512)[:: 1 if x.is_cuda else 2]:
        with triton_runtime.override(quantize=tile):
            check(x, case=case, use=use)
    for tile in dequantize_configs():
        with triton_runtime.override(dequantize=tile):
            check(x, case=case, use=use)


def test_more_than_two_to_the_31_elements_apart(device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    stride = 2**30 + 7
    with untouched_memory():
        memory = torch.empty(3 * stride + 40, dtype=torch.bfloat16, device=device)
    for x in (memory.as_strided((4, 33), (stride, 1)), memory.as_strided((33, 4), (1, stride))):
        x.copy_(torch.randn(x.shape))
        check(x, case=QuantizeCase("far", block=16), use=use)


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    x = torch.randn(3, 40, device=device)
    torch.library.opcheck(triton_quantize, (x, "int8", 16, False))
    # The check itself multiplies what comes in, which torch cannot do in e4m3.
    values, scales = triton_quantize(x, "int8", 16, True)
    torch.library.opcheck(triton_dequantize, (values, scales, 16, torch.bfloat16))
    torch.library.opcheck(triton_fake_quantize, (x.requires_grad_(), "int8", 40, False))


def test_gradient_compilation_and_export(device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, block=16) + dequantize(quantize(x, form="e4m3", block=16))

    use("triton")
    x = torch.randn(4, 40, device=device)
    expected = Module()(x)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(x), expected)
    sizes = {"x": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(Module(), (x,), dynamic_shapes=sizes)
    assert "megaseq.quantize" in str(exported.graph)
    assert torch.equal(exported.module()(x[:3]), expected[:3])
    x.requires_grad_()
    gradient = torch.randn(4, 40, device=device)
    for call in (fake_quantize, torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")):
        assert torch.equal(torch.autograd.grad(call(x), x, gradient)[0], gradient)
