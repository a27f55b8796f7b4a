"""The ops of torch that run the activations' kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.activation.configs import default
from megaseq.kernels.activation.reference import SAME
from megaseq.kernels.rows import rows_of
from megaseq.kernels.triton_runtime import config, kind_of, on_its_device


@on_its_device
def launch_forward(hidden: Tensor, *, name: str, gated: bool, out: Tensor) -> None:
    """Runs the kernel.

    Args:
        hidden: [..., F], or [..., 2F] if gated, of any strides.
        name: of the activation.
        gated: whether the second half is multiplied in.
        out: [..., F], contiguous, written.
    """
    from megaseq.kernels.activation.triton_kernels import activation_kernel

    if not out.numel():
        return
    rows, width = rows_of(hidden), out.shape[-1]
    arguments = _arguments("activation", hidden, name=name, width=width)
    blocks = -(-width // arguments["BLOCK"])
    activation_kernel[(rows.count * blocks,)](
        rows.tensor, out, width, blocks, *rows.walk, NAME=SAME.get(name, name), GATED=gated, **arguments
    )


@on_its_device
def launch_backward(gradient: Tensor, *, hidden: Tensor, name: str, gated: bool, out: Tensor) -> None:
    """Runs the kernel.

    Args:
        gradient: of the result, [..., F], of any strides.
        hidden: as in `launch_forward`.
        name: as there.
        gated: as there.
        out: gradient of `hidden`, contiguous, written.
    """
    from megaseq.kernels.activation.triton_kernels import activation_backward_kernel

    if not out.numel():
        return
    rows, of_y, width = rows_of(hidden), rows_of(gradient), gradient.shape[-1]
    arguments = _arguments("activation_backward", hidden, name=name, width=width)
    blocks = -(-width // arguments["BLOCK"])
    activation_backward_kernel[(rows.count * blocks,)](
        of_y.tensor,
        rows.tensor,
        out,
        width,
        blocks,
        *rows.walk,
        *of_y.walk,
        NAME=SAME.get(name, name),
        GATED=gated,
        **arguments,
    )


def _arguments(kernel: str, hidden: Tensor, *, name: str, width: int) -> dict[str, int]:
    return config(kernel, key=f"{kind_of(hidden.dtype)},{SAME.get(name, name)}", default=default(width)).arguments()


@torch.library.custom_op("megaseq::activation", mutates_args=())
def triton_activation(hidden: Tensor, name: str, gated: bool) -> Tensor:
    """act(gate) * up of `hidden` [..., 2F] if gated, else act(hidden): contiguous."""
    out: Tensor = _output(hidden, name, gated)
    launch_forward(hidden, name=name, gated=gated, out=out)
    return out


@triton_activation.register_fake
def _output(hidden: Tensor, name: str, gated: bool) -> Tensor:
    width = hidden.shape[-1] // 2 if gated else hidden.shape[-1]
    return hidden.new_empty((*hidden.shape[:-1], width))


@torch.library.custom_op("megaseq::activation_backward", mutates_args=())
def triton_activation_backward(gradient: Tensor, hidden: Tensor, name: str, gated: bool) -> Tensor:
    """The gradient of `hidden`, contiguous."""
    out: Tensor = _gradient_output(gradient, hidden, name, gated)
    launch_backward(gradient, hidden=hidden, name=name, gated=gated, out=out)
    return out


@triton_activation_backward.register_fake
def _gradient_output(gradient: Tensor, hidden: Tensor, name: str, gated: bool) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, *how = inputs
    ctx.save_for_backward(hidden)
    ctx.how = how


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (hidden,) = ctx.saved_tensors
    return triton_activation_backward(gradient, hidden, *ctx.how), None, None


triton_activation.register_autograd(_gradients, setup_context=_remember)
