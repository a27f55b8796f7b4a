"""Token embeddings, which may also be the matrix of the softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import FROM_PARENT
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Initializer, ScaledGaussian
from megaseq.parallel.spec import Ranks, shard_of


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
    divisible = True

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.weight = self.create_parameter(
            "weight", shape=(p.vocab_size, p.dim), axes=("vocab", "model"), init=p.init.instantiate()
        )
        self.scale = p.dim**0.5 if p.scale_by_sqrt_dim else 1.0
        # (first, number) of the tokens whose vectors are here, where tensor ranks share the vocabulary.
        self.span: tuple[int, int] | None = None

    def divide(self, ranks: Ranks) -> None:
        """Learns which tokens' vectors are here."""
        super().divide(ranks)
        shard = shard_of(self.weight)
        if shard is not None and "tensor" in shard.axes:
            self.span = (shard.boxes[0].start[0], shard.boxes[0].size[0])

    def forward(self, ids: Tensor) -> Tensor:
        """Looks up `ids` [...]; returns [..., D]."""
        vectors = functional.embedding(ids, self.weight) if self.span is None else self._look_up_here(ids)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def _look_up_here(self, ids: Tensor) -> Tensor:
        """Every rank gives the vectors it has and zeros for the others; the sum over ranks is the whole."""
        first, number = self.span or (0, 0)
        places = ids - first
        elsewhere = (places < 0) | (places >= number)
        found = functional.embedding(torch.where(elsewhere, 0, places), self.weight)
        vectors = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return vectors if self.ranks is None else self.ranks.sum(vectors)
