"""Linear maps; projections that read the same input are fused in one matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from megaseq.base import FROM_PARENT
from megaseq.base.errors import must
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Constant, Initializer, ScaledUniform
from megaseq.layers.tokens import Tokens
from megaseq.parallel.spec import Axis, Exchange, Ranks, shard_of


class Linear(Layer):
    """y = x W^T + b, one matrix product even when `parts` projections are fused along the output."""

    class Params(Layer.Params):
        input_dim: int = FROM_PARENT
        """Width of the input."""
        output_dim: int = FROM_PARENT
        """Width of the output, the sum of the parts of a fused projection."""
        bias: bool | tuple[bool, ...] = FROM_PARENT
        """Whether there is a bias; of a fused projection also one flag for each part (Whisper's keys have none)."""
        init: Initializer.Params = ScaledUniform.Params()
        """First values of the matrix, each part on its own."""
        part_inits: tuple[Initializer.Params, ...] = ()
        """First values of each fused part, where they differ (T5's queries); empty: `init` for all."""

        def validate(self) -> Iterator[str]:
            """Refuses widths below one."""
            for name in ("input_dim", "output_dim"):
                value = getattr(self, name)
                if isinstance(value, int) and value < 1:
                    yield f"{name}: must be at least 1, but is {value}. Set the widths of the owning layer."

    params: Params
    divisible = True

    def __init__(self, p: Params, *, axes: tuple[Axis, Axis], parts: tuple[int, ...] = (), granule: int = 1) -> None:
        """Makes the map.

        Args:
            p: the params, complete.
            axes: logical axes of (output, input).
            parts: output widths of the fused projections; empty for one.
            granule: width of a head, where an axis is `heads`.

        Raises:
            ParamsError: a tuple of bias flags that is not one flag a part.
        """
        super().__init__(p)
        flags = p.bias if isinstance(p.bias, tuple) else (p.bias,) * max(len(parts), 1)
        widths = parts or (p.output_dim,)
        if len(flags) != len(widths):
            raise must("bias", f"be one flag or {len(widths)} flags", p.bias, "Give one flag for each fused projection")
        self.weight = self.create_parameter(
            "weight",
            shape=(p.output_dim, p.input_dim),
            axes=axes,
            init=p.init.instantiate(),
            parts=parts,
            part_inits=tuple(init.instantiate() for init in p.part_inits),
            granule=granule,
        )
        biased = tuple(width for width, flag in zip(widths, flags, strict=True) if flag)
        self.bias: nn.Parameter | None
        if biased:
            zeros = Constant.Params().instantiate()
            self.create_parameter(
                "bias",
                shape=(sum(biased),),
                axes=(axes[0],),
                init=zeros,
                parts=biased if parts else (),
                granule=granule,
            )
        else:
            self.register_parameter("bias", None)
        # (width, has a bias) of each part, only where some parts have a bias and others do not.
        self.uneven = tuple(zip(widths, flags, strict=True)) if biased and len(biased) < len(widths) else ()
        self.exchange: Exchange | None = None
        self.input_is_copied = False

    def divide(self, ranks: Ranks) -> None:
        """Takes the exchange of a map that has a part of its outputs or reads a part of its inputs."""
        super().divide(ranks)
        shard = shard_of(self.weight)
        if shard is None or "tensor" not in shard.axes:
            return
        inputs = shard.local_shape[1] < self.params.input_dim
        self.exchange = ranks.row() if inputs else ranks.column(entered=self.input_is_copied)
        if self.uneven:
            flags = (flag for _, flag in self.uneven)
            self.uneven = tuple((box.size[0], flag) for box, flag in zip(shard.boxes, flags, strict=True))

    def full_bias(self, bias: Tensor | None) -> Tensor | None:
        """Returns the bias of the whole output, zero where a part has none; None if no part has one."""
        if bias is None or not self.uneven:
            return bias
        pieces, start = [], 0
        for width, biased in self.uneven:
            pieces.append(bias[start : start + width] if biased else bias.new_zeros(width))
            start += width if biased else 0
        return torch.cat(pieces)

    def forward(self, x: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """Maps `x` [..., input_dim] to [..., output_dim].

        Args:
            x: the input.
            tokens: which tokens the residual stream has, on the side of the map that is not divided; None: all.
        """
        exchange = self.exchange
        if self.ranks is None:
            return functional.linear(x, self.weight, self.full_bias(self.bias) if self.uneven else self.bias)
        if exchange is None:
            weight = self.whole(self.weight, tokens=tokens)
            bias = None if self.bias is None else self.whole(self.bias, tokens=tokens)
            return functional.linear(x, weight, self.full_bias(bias))
        divided = tokens is not None and tokens.divided
        weight = exchange.own(self.weight, divided=divided)
        bias = None if self.bias is None else exchange.own(self.bias, divided=divided)
        return exchange.linear(x, weight=weight, bias=self.full_bias(bias), divided=divided)
