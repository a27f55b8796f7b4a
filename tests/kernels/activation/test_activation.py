"""Activations: gradients of the reference, what is chosen in host memory, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels.activation import gated_activation
from megaseq.kernels.activation.reference import FUNCTIONS, reference_activation
from megaseq.kernels.checks import KernelError


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(name: str, gated: bool) -> None:
    hidden = torch.linspace(-3.05, 3, 24, dtype=torch.float64).view(2, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_activation(x, name=name, gated=gated), (hidden,))


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_host_memory_it_is_the_reference(asked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked:
        monkeypatch.setenv("MEGASEQ_KERNELS", "activation=reference")
    hidden = torch.randn(3, 10, dtype=dtype)
    gate, up = hidden.chunk(2, dim=-1)
    assert torch.equal(gated_activation(hidden, name="silu"), torch.nn.functional.silu(gate) * up)
    assert torch.equal(gated_activation(hidden, name="relu", gated=False), hidden.relu())
    assert torch.equal(gated_activation(hidden, name="gelu"), reference_activation(hidden, name="gelu", gated=True))


@pytest.mark.parametrize(
    ("hidden", "options", "words"),
    [
        (torch.zeros(3, 5), {"name": "relu"}, r"hidden must have shape \[..., 2F\], but is \[3, 5\]"),
        (torch.zeros(()), {"name": "relu", "gated": False}, r"hidden must have shape \[..., F\], but is \[\]"),
        (torch.zeros(3, 4, dtype=torch.int32), {"name": "relu"}, "hidden must be floating point, but is torch.int32"),
        (torch.zeros(3, 4), {"name": "softplus"}, "name must be one of relu, .*, but is softplus"),
        (torch.zeros(3, 4, dtype=torch.float64), {"name": "relu"}, "is triton, and .*(float64|GPU)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    hidden: Tensor, options: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "activation=triton")
    with pytest.raises(KernelError, match=f"activation: .*{words}") as caught:
        gated_activation(hidden, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_torch_refuses_is_one_sentence() -> None:
    with pytest.raises(KernelError, match=r"activation: name must be one of relu, .*, but is softplus"):
        gated_activation(torch.zeros(3, 4), name="softplus")
    with pytest.raises(KernelError, match=r"activation: hidden must have shape \[..., 2F\], but is \[3, 5\]"):
        gated_activation(torch.zeros(3, 5), name="relu")
    # Halves of 2 and 1, of 1 and nothing: torch would broadcast the one and not divide the other.
    for width in (3, 1):
        with pytest.raises(KernelError, match=rf"hidden must have shape \[..., 2F\], but is \[2, {width}\]"):
            gated_activation(torch.zeros(2, width), name="relu")
    with pytest.raises(KernelError, match=r"activation: hidden must be floating point, but is torch\.int64"):
        gated_activation(torch.zeros(2, 4, dtype=torch.int64), name="relu")
