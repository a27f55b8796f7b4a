"""The op of torch that runs the rotation's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.rotary.configs import default
from megaseq.kernels.triton_runtime import config, kind_of, on_its_device


@on_its_device
def launch(x: Tensor, *, cosines: Tensor, sines: Tensor, interleaved: bool, inverse: bool, out: Tensor) -> None:
    """Runs the kernel.

    Args:
        x: [B, T, N, H], the elements of a head neighbours.
        cosines: [B or 1, T, 1, R], the elements of a token neighbours.
        sines: as the cosines.
        interleaved: whether pairs are neighbours.
        inverse: turns back.
        out: [B, T, N, H], contiguous, written.
    """
    from megaseq.kernels.rotary.triton_kernels import rotate_kernel

    batch, length, num_heads, head_dim = x.shape
    width = cosines.shape[-1]
    if not x.numel():
        return
    arguments = config("rotary", key=f"{kind_of(x.dtype)},H={head_dim}", default=default()).arguments()
    # Multi-query attention has a single key head.
    arguments["HEADS"] = min(arguments["HEADS"], _power_of_two(num_heads))
    rest = head_dim - width
    rotate_kernel[(batch * length, -(-num_heads // arguments["HEADS"]))](
        x,
        out,
        cosines,
        sines,
        length,
        num_heads,
        head_dim,
        width,
        *x.stride()[:3],
        *_strides(cosines),
        *_strides(sines),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        PAIRS=_power_of_two(width // 2),
        REST=_power_of_two(rest) if rest else 0,
        **arguments,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _strides(angles: Tensor) -> tuple[int, int]:
    """Distances of rows and of tokens; zero between rows that share their angles."""
    return 0 if angles.shape[0] == 1 else angles.stride(0), angles.stride(1)


@torch.library.custom_op("megaseq::rotate", mutates_args=())
def triton_rotate(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """`x` [B, T, N, H] turned by the angles of `cosines` and `sines` [B or 1, T, 1, R], or back: contiguous."""
    out = x.new_empty(x.shape)
    x, cosines, sines = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cosines, sines))
    launch(x, cosines=cosines, sines=sines, interleaved=interleaved, inverse=inverse, out=out)
    return out


@triton_rotate.register_fake
def _output(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosines, sines, *how = inputs
    ctx.save_for_backward(cosines, sines)
    ctx.how = how


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    cosines, sines = ctx.saved_tensors
    interleaved, inverse = ctx.how
    # A rotation's transpose turns back.
    return triton_rotate(gradient, cosines, sines, interleaved, not inverse), None, None, None, None


triton_rotate.register_autograd(_gradients, setup_context=_remember)
