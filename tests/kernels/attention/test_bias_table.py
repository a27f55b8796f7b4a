"""The readable form of a table of biases: its gradient, and when it is made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.kernels.attention import RelativeBias
from megaseq.kernels.attention.bias_table import LOG2_E, TABLE_PAD, readable_table


def columns(table: Tensor) -> Tensor:
    """The same by a gather."""
    places = torch.arange(-TABLE_PAD, table.shape[1] + TABLE_PAD).clamp(0, table.shape[1] - 1)
    return table.float()[:, places] * LOG2_E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_ends_are_repeated_and_their_gradients_summed(width: int, dtype: torch.dtype) -> None:
    table = torch.randn(3, width).to(dtype).requires_grad_()
    found, wanted = readable_table(table), columns(table)
    assert found.dtype is torch.float32 and found.is_contiguous() and torch.equal(found, wanted)
    gradient = torch.randn_like(found)
    (mine,), (theirs,) = (torch.autograd.grad(one, table, gradient) for one in (found, wanted))
    # The order of a sum of some hundred numbers differs.
    torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def computed() -> tuple[RelativeBias, Tensor]:
    """A bias by a table that is computed, as a layer computes it, and what of."""
    weight = torch.randn(2, 5, requires_grad=True)
    return RelativeBias(table=weight * 1.0, first=-2), weight


def test_layers_share_what_is_made_once() -> None:
    bias, weight = computed()
    first, again = bias.readable()[0], bias.readable()[0]
    assert first is again and first is not None and first.requires_grad
    with torch.no_grad():
        other = bias.readable()[0]
    assert other is not first and other is not None and not other.requires_grad
    again = bias.readable()[0]
    assert again is not None and again.requires_grad
    # The layers' gradients meet in it.
    (gradient,) = torch.autograd.grad([first.sum(), first.sum()], weight)
    torch.testing.assert_close(gradient[0, 1:4], torch.full((3,), 2 * LOG2_E))
    torch.testing.assert_close(gradient[0, 0], torch.tensor(2 * LOG2_E * (TABLE_PAD + 1)))


def test_a_changed_table_is_read_anew() -> None:
    table = torch.randn(2, 5)
    bias = RelativeBias(table=table)
    before = bias.readable()[0]
    table.mul_(2.0)
    after = bias.readable()[0]
    assert before is not None and after is not None and torch.equal(after, 2 * before)


@pytest.mark.parametrize("change", ["in place", "past autograd"])
def test_a_trained_parameter_is_always_read_anew(change: str) -> None:
    """Optimisers write through .data, which leaves no trace."""
    weight = torch.nn.Parameter(torch.randn(2, 5))
    bias = RelativeBias(table=weight)
    before = bias.readable()[0]
    assert before is not None
    before.sum().backward()
    if change == "in place":
        with torch.no_grad():
            weight.mul_(2.0)
    else:
        weight.data = weight.data * 2.0
    after = bias.readable()[0]
    assert after is not None and torch.equal(after, 2 * before)
    after.sum().backward()


def test_slopes_and_inference() -> None:
    with torch.inference_mode():
        bias = RelativeBias(slopes=torch.tensor([0.5, 0.25]))
        table, slopes = bias.readable()
        assert table is None and slopes is not None and bias.readable()[1] is slopes
        assert slopes.tolist() == [0.5 * torch.tensor(LOG2_E).item(), 0.25 * torch.tensor(LOG2_E).item()]
