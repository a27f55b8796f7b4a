"""Token embeddings, which may also be the matrix of the softmax."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from megaseq.base import FROM_PARENT
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Initializer, ScaledGaussian


class Embedding(Layer):
    """A trained vector for each token."""

    class Params(Layer.Params):
        vocab_size: int = FROM_PARENT
        """Rows V, with those that only pad the vocabulary."""
        dim: int = FROM_PARENT
        """Width D."""
        scale_by_sqrt_dim: bool = False
        """Whether looked-up vectors are multiplied by D^0.5 (Vaswani et al. 2017, section 3.4)."""
        init: Initializer.Params = ScaledGaussian.Params()
        """First values; the default's deviation is D^-0.5."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.weight = self.create_parameter(
            "weight", shape=(p.vocab_size, p.dim), axes=("vocab", "model"), init=p.init.instantiate()
        )
        self.scale = p.dim**0.5 if p.scale_by_sqrt_dim else 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """Looks up `ids` [...]; returns [..., D]."""
        vectors = functional.embedding(ids, self.weight)
        return vectors if self.scale == 1.0 else vectors * self.scale
