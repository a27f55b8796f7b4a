"""LayerNorm and RMSNorm over the last dimension, with the sum before it and the quantisation after it in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.checks import check_device, check_floating, check_shape, fail
from megaseq.kernels.dispatch import choose, log_once, undirected
from megaseq.kernels.norm import apex
from megaseq.kernels.norm.configs import WIDEST
from megaseq.kernels.norm.op import run_norm, triton_norm_quantize
from megaseq.kernels.norm.reference import precise_norm, reference_norm
from megaseq.kernels.norm.settings import NormKind, QuantizedNorm
from megaseq.kernels.quantize import lacks_e4m3
from megaseq.kernels.quantize.formats import FORMATS, FormatName, Quantized
from megaseq.kernels.quantize.reference import reference_quantize
from megaseq.kernels.rows import DTYPES, unfit

__all__ = ["NormKind", "QuantizedNorm", "add_norm", "norm", "norm_quantize"]

_OP = "norm"


def norm(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, kind: NormKind) -> Tensor:
    """Normalises every row; statistics are taken in fp32 (fp64 for fp64) whatever the dtype.

    Args:
        x: [..., D].
        weight: [D], of any floating-point dtype.
        bias: [D], or None.
        kind: which norm.

    Returns:
        [..., D] in the dtype of `x`.

    Raises:
        KernelError: for tensors that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that cannot run
            this call.
    """
    if x.is_cpu and undirected():
        # Small tensors in decoding take no longer than the checks, which are left for what fails.
        log_once(_OP, "torch")
        try:
            return _torch_norm(x, weight=weight, bias=bias, kind=kind)
        except RuntimeError:
            _check(x, weight=weight, bias=bias, residual=None, op=_OP)
            raise
    _check(x, weight=weight, bias=bias, residual=None, op=_OP)
    chosen = _choose(x, weight=weight, bias=bias, residual=None, kind=kind)
    if chosen == "triton":
        y: Tensor = run_norm(x, None, weight, bias, kind.eps, kind.centred, kind.add_one)[0]
        return y
    run = {"torch": _torch_norm, "apex": apex.apex_norm, "reference": reference_norm}[chosen]
    return run(x, weight=weight, bias=bias, kind=kind)


def add_norm(
    x: Tensor, *, residual: Tensor, weight: Tensor, bias: Tensor | None = None, kind: NormKind
) -> tuple[Tensor, Tensor]:
    """`norm(residual + x)` and the sum itself, which is read once.

    Args:
        x: [..., D].
        residual: [..., D]; the results have the wider of both dtypes.
        weight: as in `norm`.
        bias: as in `norm`.
        kind: which norm.

    Returns:
        The normalised sum and the sum, [..., D] each.

    Raises:
        KernelError: as `norm`.
    """
    if x.is_cpu and undirected() and residual.is_cpu and residual.shape == x.shape and residual.is_floating_point():
        total = residual + x
        return norm(total, weight=weight, bias=bias, kind=kind), total
    _check(x, weight=weight, bias=bias, residual=residual, op="add_norm")
    if _choose(x, weight=weight, bias=bias, residual=residual, kind=kind) == "triton":
        y, total, *_ = run_norm(x, residual, weight, bias, kind.eps, kind.centred, kind.add_one)
        return y, total
    total = residual + x
    return norm(total, weight=weight, bias=bias, kind=kind), total


def norm_quantize(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    kind: NormKind,
    form: FormatName = "int8",
) -> QuantizedNorm:
    """`quantize(norm(residual + x))` with a scale for each row, without rounding in between; it has no gradient.

    Args:
        x: [..., D], fp32, bf16 or fp16.
        weight: as in `norm`.
        bias: as in `norm`.
        residual: [..., D] of such a dtype, or None.
        kind: which norm.
        form: the format of the values; see `quantize`.

    Raises:
        KernelError: as `norm`.
    """
    _check(x, weight=weight, bias=bias, residual=residual, op="norm_quantize")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise fail(
                name, op="norm_quantize", expected="be float32, bfloat16 or float16", came=tensor.dtype,
                remedy="Cast it before the call",
            )  # fmt: skip
    if form not in FORMATS:
        raise fail("form", op="norm_quantize", expected=f"be one of {', '.join(FORMATS)}", came=form, remedy="Use int8")
    x, weight = x.detach(), weight.detach()
    bias, residual = (None if tensor is None else tensor.detach() for tensor in (bias, residual))
    no_floats = form == "e4m3" and lacks_e4m3(x.device)
    if not no_floats and _choose(x, weight=weight, bias=bias, residual=residual, kind=kind) == "triton":
        values, scales, total = triton_norm_quantize(
            x, residual, weight, bias, kind.eps, kind.centred, kind.add_one, form
        )
        return QuantizedNorm(Quantized(values, scales, x.shape[-1]), None if residual is None else total)
    total = x if residual is None else residual + x
    y = precise_norm(total, weight=weight, bias=bias, kind=kind)
    values, scales = reference_quantize(y, form=form, block=x.shape[-1], power_of_two=False)
    return QuantizedNorm(Quantized(values, scales, x.shape[-1]), None if residual is None else total)


def _torch_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Torch's own norms, without the detour of torch.nn.functional."""
    width = x.shape[-1:]
    if kind.centred:
        if weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
            return _mixed_layer_norm(x, weight=weight, bias=bias, kind=kind)
        return torch.layer_norm(x, width, weight + 1.0 if kind.add_one else weight, bias, kind.eps)
    if kind.add_one:
        weight = weight + 1.0
    # Only with a weight of the input's dtype is the fused path taken.
    if weight.dtype is not x.dtype:
        check_floating(weight, op=_OP, argument="weight")
        weight = weight.to(x.dtype)
    y = torch.rms_norm(x, width, weight, kind.eps)
    if bias is None:
        return y
    check_floating(bias, op=_OP, argument="bias")
    check_shape(bias, op=_OP, argument="bias", shape=tuple(width), legend="[D]")
    return y + bias.to(x.dtype)


def _mixed_layer_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: NormKind) -> Tensor:
    """Where weight or bias have another dtype than `x`: torch takes float32 beside a narrower `x` in host memory.

    It does so without values too, where the memory planner reads what is kept: the reference would keep a copy of the
    input in float32, which neither torch nor our kernel does.
    """
    _check(x, weight=weight, bias=bias, residual=None, op=_OP)
    wide = all(tensor is None or tensor.dtype is torch.float32 for tensor in (weight, bias))
    if (x.is_cpu or x.is_meta) and wide and x.dtype in (torch.bfloat16, torch.float16):
        return torch.layer_norm(x, x.shape[-1:], weight + 1.0 if kind.add_one else weight, bias, kind.eps)
    return reference_norm(x, weight=weight, bias=bias, kind=kind)


def _choose(x: Tensor, *, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: NormKind) -> str:
    """The implementation that runs."""
    impossible: dict[str, str] = {}
    reason = unfit(x, weight, bias, residual)
    if reason is None and x.shape[-1] > WIDEST:
        reason = f"its kernels hold rows of at most {WIDEST} elements, not {x.shape[-1]}"
    if reason is not None:
        impossible["triton"] = reason
    of_apex = _unfit_for_apex(x, weight=weight, bias=bias, residual=residual, kind=kind)
    if of_apex is not None:
        impossible["apex"] = of_apex
    automatic = "torch"
    if x.device.type == "cuda":
        automatic = "apex" if of_apex is None else "triton" if reason is None else automatic
    return choose(_OP, automatic=automatic, impossible=impossible)


def _unfit_for_apex(
    x: Tensor, *, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: NormKind
) -> str | None:
    if x.device.type != "cuda":
        return f"apex's norms run on a GPU, not on {x.device.type}"
    if torch.compiler.is_compiling():
        return "apex's norms are no part of a compiled graph"
    if residual is not None or kind.add_one or kind.centred != (bias is not None) or weight.dtype != x.dtype:
        return "apex's norms take no residual, no weight of another dtype, and a bias in LayerNorm alone"
    return apex.missing()


def _check(x: Tensor, *, weight: Tensor, bias: Tensor | None, residual: Tensor | None, op: str) -> None:
    """Checks all tensors.

    Raises:
        KernelError: at the first one that does not fit.
    """
    check_floating(x, op=op, argument="x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise fail(
            "x",
            op=op,
            expected="have shape [..., D] with D at least 1",
            came=list(x.shape),
            remedy="Leave out rows without elements",
        )
    for name, tensor, shape, legend in (
        ("weight", weight, x.shape[-1:], "[D]"),
        ("bias", bias, x.shape[-1:], "[D]"),
        ("residual", residual, x.shape, "of x"),
    ):
        if tensor is not None:
            check_floating(tensor, op=op, argument=name)
            check_shape(tensor, op=op, argument=name, shape=tuple(shape), legend=legend)
            check_device(tensor, op=op, argument=name, other=x, other_name="x")
