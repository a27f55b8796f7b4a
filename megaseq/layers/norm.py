"""Normalisation over the last dimension; statistics are taken in float32 whatever the input's dtype."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from megaseq.base import FROM_PARENT
from megaseq.kernels.norm import NormKind, add_norm, norm
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Constant
from megaseq.layers.tokens import Tokens


class Norm(Layer):
    """Base of the norms: [..., D] to [..., D]."""

    class Params(Layer.Params):
        dim: int = FROM_PARENT
        """Width D of the input."""
        eps: float = 1e-5
        """Added to the variance."""

        def validate(self) -> Iterator[str]:
            """Refuses an epsilon that is not positive."""
            if self.eps <= 0:
                yield f"eps: must be positive, but is {self.eps}. 1e-5 and 1e-6 are usual."

    params: Params
    of_heads = False
    """Whether the norm is over heads, of which a tensor rank has a part."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
        """Normalises `x` [..., D], or `residual` + `x`; returns [..., D].

        Args:
            x: what is normalised.
            residual: [..., D], added first; None: nothing.
            tokens: which tokens `x` has; None: all.
        """
        raise NotImplementedError

    def whole(self, parameter: Tensor, *, tokens: Tokens | None) -> Tensor:
        """Returns a parameter for use on `tokens`, or on this rank's heads; see `Layer.whole`."""
        if self.of_heads and self.ranks is not None:
            return self.ranks.copy(parameter)
        return super().whole(parameter, tokens=tokens)


class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016)."""

    class Params(Norm.Params):
        bias: bool = True
        """Whether there is a bias."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.kind = NormKind(p.eps, centred=True)
        self.weight = self.create_parameter("weight", shape=(p.dim,), axes=("model",), init=_ones())
        self.bias: nn.Parameter | None
        if p.bias:
            self.create_parameter("bias", shape=(p.dim,), axes=("model",), init=Constant.Params().instantiate())
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
        """Normalises `x` [..., D], or `residual` + `x`, which has `tokens`; returns [..., D]."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.ranks is not None:
            weight = self.whole(weight, tokens=tokens)
            bias = None if bias is None else self.whole(bias, tokens=tokens)
        if residual is not None:
            return add_norm(x, residual=residual, weight=weight, bias=bias, kind=self.kind)[0]
        return norm(x, weight=weight, bias=bias, kind=self.kind)


class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight, without mean or bias (Zhang and Sennrich 2019)."""

    class Params(Norm.Params):
        eps: float = 1e-6
        """Added to the mean square."""
        add_one: bool = False
        """Multiply by 1 + weight, with weights that start at zero (Gemma), instead of by the weight."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.kind = NormKind(p.eps, add_one=p.add_one)
        init = Constant.Params(value=0.0 if p.add_one else 1.0).instantiate()
        self.weight = self.create_parameter("weight", shape=(p.dim,), axes=("model",), init=init)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
        """Normalises `x` [..., D], or `residual` + `x`, which has `tokens`; returns [..., D]."""
        weight = self.weight if self.ranks is None else self.whole(self.weight, tokens=tokens)
        if residual is not None:
            return add_norm(x, residual=residual, weight=weight, kind=self.kind)[0]
        return norm(x, weight=weight, kind=self.kind)


def _ones() -> Constant:
    ones: Constant = Constant.Params(value=1.0).instantiate()
    return ones
