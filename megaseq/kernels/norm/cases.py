"""The calls of the norms that tests prove and benchmarks time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaseq.kernels.compile_case import CompileCase
from megaseq.kernels.norm.configs import configs, default
from megaseq.kernels.norm.settings import NormKind
from megaseq.kernels.triton_runtime import Config, override, version

LAYER = NormKind(1e-5, centred=True)
RMS = NormKind(1e-6)


@dataclass(frozen=True)
class NormCase:
    """Sizes and kind of one call."""

    name: str
    shape: tuple[int, ...] = (3, 5, 70)
    kind: NormKind = field(default=RMS)
    biased: bool = False
    strided: bool = False
    """x and residual are columns of a wider tensor."""

    def tensors(self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        """x, residual, weight, bias, wanting gradients; the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        width = self.shape[-1]

        def leaf(*shape: int) -> Tensor:
            wide = torch.randn(*shape[:-1], 3 * shape[-1], generator=generator, dtype=torch.float64)
            wide = wide.to(device=device, dtype=dtype)
            narrow = wide[..., width : 2 * width]
            return (narrow if self.strided else narrow.contiguous()).requires_grad_()

        return {
            "x": leaf(*self.shape),
            "residual": leaf(*self.shape),
            "weight": leaf(width),
            "bias": leaf(width) if self.biased else None,
        }


CASES = (
    NormCase("rms"),
    NormCase("layer", kind=LAYER, biased=True),
    NormCase("layer_without_bias", kind=LAYER),
    NormCase("rms_add_one", kind=NormKind(1e-6, add_one=True)),
    NormCase("rms_bias_strided", biased=True, strided=True),
    NormCase("layer_strided", kind=LAYER, biased=True, strided=True, shape=(2, 9, 33)),
    NormCase("heads", shape=(2, 9, 3, 16)),
    NormCase("wide", shape=(3, 2500), kind=LAYER, biased=True),
    NormCase("one_row", shape=(512,)),
    # With two columns the gradient of a centred norm vanishes, and nothing but rounding is left.
    NormCase("three_columns", shape=(7, 3), kind=LAYER, biased=True),
    NormCase("many_rows", shape=(400, 8)),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error of results and gradients (as vectors), relative to the reference in float64."""


def compile_cases() -> list[CompileCase]:
    """Every configuration of some widths, and every variant with what runs where no table says otherwise."""
    found: dict[str, tuple[Callable[..., None], int, torch.dtype, NormKind, Config]] = {}
    for width in (64, 1024, 4096, 8192):
        for config in configs(width):
            name = f"{width}_rows{config.blocks['ROWS']}_warps{config.num_warps}"
            found[name] = functools.partial(_train, sums=(True,)), width, torch.bfloat16, LAYER, config
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_layer"] = _train, 1024, dtype, LAYER, default(1024)
        found[f"{name}_rms"] = _train, 1024, dtype, RMS, default(1024)
    found["autocast"] = functools.partial(_train, stream=torch.float32), 1024, torch.bfloat16, LAYER, default(1024)
    found["int8"] = functools.partial(_quantize, form=torch.int8), 1024, torch.bfloat16, RMS, default(1024)
    # Of float32 rows Triton 3.6 spills two registers, on sm_100.
    spills = 8 if version() < (3, 9) else 0
    cases = [
        CompileCase(
            name,
            functools.partial(launch, width, dtype=dtype, kind=kind, config=config),
            spill_bytes=spills if name == "float32_layer" else 0,
        )
        for name, (launch, width, dtype, kind, config) in found.items()
    ]
    form = functools.partial(_quantize, form=torch.float8_e4m3fn)
    e4m3 = functools.partial(form, 1024, dtype=torch.bfloat16, kind=RMS, config=default(1024))
    return [*cases, CompileCase("e4m3", e4m3, minimum_architecture=90)]


def _train(
    width: int,
    *,
    dtype: torch.dtype,
    kind: NormKind,
    config: Config,
    sums: tuple[bool, ...] = (False, True),
    stream: torch.dtype | None = None,
) -> None:
    """Launches both kernels, with and without a sum; `stream` is the dtype of residual and weights if another."""
    from megaseq.kernels.norm.op import launch_backward, launch_forward

    x, weight = torch.zeros(8, width, dtype=dtype), torch.ones(width, dtype=stream or dtype)
    mean, rstd = torch.zeros(8), torch.ones(8)
    with override(norm=config, norm_backward=config):
        for summed in sums:
            total = torch.zeros(8, width, dtype=stream or dtype) if summed else x
            launch_forward(
                x,
                residual=total if summed else None,
                weight=weight,
                bias=weight if kind.centred else None,
                kind=kind,
                out=total,
                total=total if summed else None,
                others=(mean, rstd, None),
            )
            launch_backward(
                total,
                dtotal=total if summed else None,
                total=total,
                weight=weight,
                statistics=(mean, rstd),
                kind=kind,
                ds=total,
                wanted=(True, kind.centred),
            )


def _quantize(width: int, *, dtype: torch.dtype, kind: NormKind, config: Config, form: torch.dtype) -> None:
    from megaseq.kernels.norm.op import launch_forward

    x, weight = torch.zeros(8, width, dtype=dtype), torch.ones(width, dtype=dtype)
    with override(norm=config):
        launch_forward(
            x,
            residual=x,
            weight=weight,
            bias=None,
            kind=kind,
            out=torch.empty(8, width, dtype=form),
            total=x,
            others=(None, None, torch.ones(8)),
        )
