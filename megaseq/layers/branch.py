"""A residual branch: where the norm sits around a block, and the dropout before the sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from megaseq.base import FROM_PARENT
from megaseq.layers.base import Layer
from megaseq.layers.norm import Norm
from megaseq.layers.tokens import Tokens

ResidualStyle = Literal["pre", "post", "sandwich"]


class Branch(Layer):
    """Base of the blocks of a Transformer layer.

    `pre`: x + f(norm(x)) (Xiong et al. 2020); `post`: norm(x + f(x)) (Vaswani et al. 2017);
    `sandwich`: x + post_norm(f(norm(x))) (Ding et al. 2021; T5Gemma).
    """

    class Params(Layer.Params):
        model_dim: int = FROM_PARENT
        """Width D of input and output."""
        norm: Norm.Params = FROM_PARENT
        """The norm; its `dim` is `model_dim`."""
        residual: ResidualStyle = FROM_PARENT
        """Where the norm sits."""
        dropout: float = FROM_PARENT
        """Chance of zeroing an element of the branch before the sum, in training."""
        bias: bool = FROM_PARENT
        """Whether the linear maps have biases, where they do not say so themselves."""

        def validate(self) -> Iterator[str]:
            """Refuses a dropout outside [0, 1)."""
            if isinstance(self.dropout, float | int) and not 0 <= self.dropout < 1:
                yield f"dropout: must be in [0, 1), but is {self.dropout}. 0.1 is usual."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.norm: Norm = p.norm.replace(dim=p.model_dim).instantiate()
        self.post_norm: Norm | None = None
        if p.residual == "sandwich":
            self.post_norm = p.norm.replace(dim=p.model_dim).instantiate()
        self.normalises_input = p.residual != "post"

    def enter(self, x: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """Returns what the block reads of the residual stream `x` [B, T, D], which has `tokens`."""
        return self.norm(x, tokens=tokens) if self.normalises_input else x

    def leave(self, x: Tensor, y: Tensor, *, tokens: Tokens | None = None) -> Tensor:
        """Adds the block's output `y` [B, T, D] to the residual stream `x` [B, T, D]; returns the new stream.

        Args:
            x: the stream.
            y: what the block computed.
            tokens: which rows and tokens both hold; None: the context's rows, whole.
        """
        if self.post_norm is not None:
            y = self.post_norm(y, tokens=tokens)
        rate = self.params.dropout
        if not self.normalises_input and not (self.training and rate):
            normed: Tensor = self.norm(y, residual=x, tokens=tokens)
            return normed
        x = self.drop_add(y, residual=x, rate=rate, tokens=tokens)
        return x if self.normalises_input else self.norm(x, tokens=tokens)
