"""The ops of torch that run the norms' kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.functions import direct
from megaseq.kernels.norm.configs import columns_of, default
from megaseq.kernels.norm.settings import NormKind
from megaseq.kernels.quantize.formats import FORMATS, SMALLEST_SCALE
from megaseq.kernels.rows import rows_of
from megaseq.kernels.triton_runtime import config, kind_of, on_its_device

PROCESSORS_ON_HOST = 2
"""What stands for the number of multiprocessors where there is no GPU."""
TILES_OF_PROGRAM = 8
"""Tiles that a program of a backward pass sums up, where there are enough for all multiprocessors."""
PROGRAMS_OF_PROCESSOR = 4
"""Programs for each multiprocessor, at most: as many hide the time that memory takes to answer."""


def total_dtype(x: Tensor, *, residual: Tensor | None) -> torch.dtype:
    """The dtype of `x + residual`, in which the result is too."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@on_its_device
def launch_forward(
    x: Tensor,
    *,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: NormKind,
    out: Tensor,
    total: Tensor | None,
    others: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Runs the kernel.

    Args:
        x: [..., D], of any strides.
        residual: the same shape, or None.
        weight: [D], contiguous.
        bias: [D], contiguous, or None.
        kind: which norm.
        out: [..., D], contiguous, written; int8 or float8 with scales.
        total: as `out`, `x + residual`; needed with a residual.
        others: float32 [R] each, R rows, contiguous, written: means (of a centred norm) and inverse deviations, both or
            neither; scales of a quantised result.
    """
    from megaseq.kernels.norm.triton_kernels import norm_kernel

    width = x.shape[-1]
    if not x.numel():
        return
    mean, rstd, scales = others
    rows, more = rows_of(x), rows_of(x if residual is None else residual)
    tile = config("norm", key=_key(x, kind=kind), default=default(width))
    form = FORMATS["int8" if out.dtype is torch.int8 else "e4m3"]
    norm_kernel[(-(-rows.count // tile.blocks["ROWS"]),)](
        rows.tensor,
        more.tensor,
        weight,
        weight if bias is None else bias,
        out,
        out if total is None else total,
        weight if mean is None else mean,
        weight if rstd is None else rstd,
        weight if scales is None else scales,
        rows.count,
        width,
        kind.eps,
        *rows.walk,
        *more.walk,
        LARGEST=form.largest,
        SMALLEST=SMALLEST_SCALE,
        CENTRED=kind.centred,
        ADD_ONE=kind.add_one,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_STATISTICS=rstd is not None,
        QUANTIZED=scales is not None,
        INTEGER=out.dtype is torch.int8,
        COLUMNS=columns_of(width),
        # What is quantised has to be rounded as the reference rounds.
        **tile.arguments(fused=scales is None),
    )


@on_its_device
def launch_backward(
    dy: Tensor,
    *,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor],
    kind: NormKind,
    ds: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Runs the kernel.

    Args:
        dy: gradient of the result, [..., D], of any strides.
        dtotal: gradient of the sum that was returned, or None.
        total: what was normalised, [..., D], of any strides.
        weight: [D], contiguous.
        statistics: means (not read if the norm is not centred) and inverse deviations, float32 [R].
        kind: which norm.
        ds: gradient of `total`, contiguous, written.
        wanted: whether there are to be gradients of weight and bias.

    Returns:
        Gradients of weight and bias by program, float32 [programs, D], None where not wanted.
    """
    from megaseq.kernels.norm.triton_kernels import norm_backward_kernel

    width = total.shape[-1]
    of_y, of_total, rows = rows_of(dy), rows_of(dy if dtotal is None else dtotal), rows_of(total)
    tile = config("norm_backward", key=_key(total, kind=kind), default=default(width))
    programs = num_programs(-(-rows.count // tile.blocks["ROWS"]), device=total.device)
    dweight, dbias = (
        torch.empty(programs, width, dtype=torch.float32, device=total.device) if want else None for want in wanted
    )
    norm_backward_kernel[(programs,)](
        of_y.tensor,
        of_total.tensor,
        rows.tensor,
        weight,
        *statistics,
        ds,
        ds if dweight is None else dweight,
        ds if dbias is None else dbias,
        rows.count,
        width,
        *of_y.walk,
        *of_total.walk,
        *rows.walk,
        CENTRED=kind.centred,
        ADD_ONE=kind.add_one,
        HAS_TOTAL=dtotal is not None,
        HAS_DWEIGHT=dweight is not None,
        HAS_DBIAS=dbias is not None,
        COLUMNS=columns_of(width),
        **tile.arguments(),
    )
    return dweight, dbias


def _key(x: Tensor, *, kind: NormKind) -> str:
    return _name(x.dtype, x.shape[-1], kind.centred)


@functools.lru_cache(maxsize=256)
def _name(dtype: torch.dtype, width: int, centred: bool) -> str:
    return f"{kind_of(dtype)},D={width},{'layer' if centred else 'rms'}"


def num_programs(tiles: int, *, device: torch.device) -> int:
    """Programs that share the tiles of a backward pass: the more, the more sums torch has to add in the end."""
    processors = _num_processors(device)
    wanted = max(processors, -(-tiles // TILES_OF_PROGRAM))
    return min(tiles, wanted, PROGRAMS_OF_PROCESSOR * processors)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_ON_HOST
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    add_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised [..., D], `x + residual` [..., D] (empty without residual), means and inverse deviations [R]."""
    y, total, mean, rstd = _outputs(x, residual, weight, bias, eps, centred, add_one)
    launch_forward(
        x,
        residual=residual,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        kind=NormKind(eps, centred, add_one),
        out=y,
        total=total,
        others=(mean, rstd, None),
    )
    return y, total, mean, rstd


triton_norm = torch.library.custom_op("megaseq::norm", _run, mutates_args=())


@triton_norm.register_fake
def _outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    add_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = total_dtype(x, residual=residual)
    num_rows = x.numel() // max(x.shape[-1], 1)
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty((0,) if residual is None else x.shape, dtype=dtype)
    mean = x.new_empty(num_rows if centred else 0, dtype=torch.float32)
    return y, total, mean, x.new_empty(num_rows, dtype=torch.float32)


def _run_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    centred: bool,
    add_one: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised [..., D], and of weight and bias [D] in float32, empty if not wanted."""
    ds, dweight, dbias = _gradient_outputs(dy, dtotal, total, weight, mean, rstd, eps, centred, add_one, wanted)
    if not total.numel():
        return ds, dweight.zero_(), dbias.zero_()
    parts = launch_backward(
        dy,
        dtotal=dtotal,
        total=total,
        weight=weight.contiguous(),
        statistics=(mean, rstd),
        kind=NormKind(eps, centred, add_one),
        ds=ds,
        wanted=(wanted[0], wanted[1]),
    )
    for part, gradient in zip(parts, (dweight, dbias), strict=True):
        if part is not None:
            torch.sum(part, dim=0, out=gradient)
    return ds, dweight, dbias


triton_norm_backward = torch.library.custom_op("megaseq::norm_backward", _run_backward, mutates_args=())


@triton_norm_backward.register_fake
def _gradient_outputs(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    centred: bool,
    add_one: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_weights = [weight.new_empty(weight.shape if want else (0,), dtype=torch.float32) for want in wanted]
    return total.new_empty(total.shape), of_weights[0], of_weights[1]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, *kind = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.kind = kind
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, residual, weight, bias)]


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    if dy is None and dtotal is None:
        return (None,) * 7
    wanted = [bool(ctx.needs_input_grad[2]), bool(ctx.needs_input_grad[3])]
    dy = torch.zeros_like(total) if dy is None else dy
    # Without a residual no sum was returned that could have a gradient.
    dtotal = None if ctx.dtypes[1] is None else dtotal
    ds, dweight, dbias = run_norm_backward(dy, dtotal, total, weight, mean, rstd, *ctx.kind, wanted)
    found = [
        gradient.to(dtype) if dtype is not None and needed else None
        for gradient, dtype, needed in zip((ds, ds, dweight, dbias), ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*found, None, None, None)


triton_norm.register_autograd(_gradients, setup_context=_remember)

run_norm = direct(triton_norm, run=_run, keep=_remember, differentiate=_gradients)
"""The operator, for `norm`."""
run_norm_backward = direct(triton_norm_backward, run=_run_backward)
"""Likewise its gradient."""


@torch.library.custom_op("megaseq::norm_quantize", mutates_args=())
def triton_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    add_one: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit values [..., D], scales [..., 1], and `x + residual` (empty without residual); it has no gradient."""
    values, scales, total = _quantized_outputs(x, residual, weight, bias, eps, centred, add_one, form)
    launch_forward(
        x,
        residual=residual,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        kind=NormKind(eps, centred, add_one),
        out=values,
        total=total,
        others=(None, None, scales),
    )
    return values, scales, total


@triton_norm_quantize.register_fake
def _quantized_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    add_one: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(x.shape, dtype=FORMATS[form].dtype)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    shape = (0,) if residual is None else x.shape
    return values, scales, x.new_empty(shape, dtype=total_dtype(x, residual=residual))
