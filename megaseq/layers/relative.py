"""Position biases: added to the attention scores, a function of how far apart query and key are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import FROM_PARENT
from megaseq.kernels.attention import RelativeBias, computes_bias
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Gaussian, Initializer
from megaseq.parallel.spec import Ranks


class PositionBias(Layer):
    """Base of the biases. Distances are key place minus query place in the row, which equal distances of positions,
    because a segment stands in one piece and its positions count by one; other segments' keys are masked."""

    class Params(Layer.Params):
        num_heads: int = FROM_PARENT
        """Query heads N."""
        bidirectional: bool = FROM_PARENT
        """Whether queries see keys after themselves (an encoder) or not (a decoder)."""

    params: Params

    def by_distance(self, distances: Tensor) -> Tensor:
        """Returns the bias [N, L] of `distances` [L], key place minus query place."""
        raise NotImplementedError

    def relative(self, *, device: torch.device) -> RelativeBias:
        """Returns the bias of all distances."""
        raise NotImplementedError

    def forward(self, length: int, *, device: torch.device) -> Tensor | RelativeBias:
        """Returns the bias of a row of `length` T against itself, in the form that attention on `device` wants it in:
        by distance, or [1, N, T, T], made here once for all layers."""
        if computes_bias(device):
            return self.relative(device=device)
        values = self.by_distance(torch.arange(1 - length, length, device=device))
        # Windows of the 2T - 1 values are the rows, last query first.
        return values.unfold(1, length, 1).flip(1).unsqueeze(0)

    def history(self, length: int, *, device: torch.device) -> Tensor:
        """Returns the bias [1, N, 1, T] of the last place of a row of `length` T; its tail serves every shorter row."""
        return self.by_distance(torch.arange(1 - length, 1, device=device)).unsqueeze(0).unsqueeze(2)


class BucketedBias(PositionBias):
    """T5's trained bias: a value for each head and bucket of distances (Raffel et al. 2020, section 2.1)."""

    class Params(PositionBias.Params):
        num_buckets: int = 32
        """Buckets, half of them for each direction when bidirectional."""
        max_distance: int = 128
        """Distances from here on share the last bucket."""
        init: Initializer.Params = Gaussian.Params(std=0.02)
        """First values."""

        def validate(self) -> Iterator[str]:
            """Refuses bucket counts that leave no room for exact and for logarithmic buckets."""
            if self.num_buckets < 4 or self.num_buckets % 2:
                yield f"num_buckets: must be an even number of at least 4, but is {self.num_buckets}. T5 has 32."
            if self.max_distance <= self.num_buckets // 2:
                yield (
                    f"max_distance: must be above half of num_buckets, but is {self.max_distance}. "
                    "T5 has 128 with 32 buckets."
                )

    params: Params
    divisible = True

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.weight = self.create_parameter(
            "weight", shape=(p.num_buckets, p.num_heads), axes=(None, "heads"), init=p.init.instantiate()
        )

    def buckets(self, distances: Tensor) -> Tensor:
        """Returns the bucket of each of `distances` [...]: exact up to half of the buckets, then logarithmic."""
        p = self.params
        count = p.num_buckets
        base = torch.zeros_like(distances)
        if p.bidirectional:
            count //= 2
            base = (distances > 0).to(distances.dtype) * count
            distances = distances.abs()
        else:
            distances = (-distances).clamp(min=0)
        exact = count // 2
        # float32, as T5 does it, so that distances on the edge of a bucket fall on the same side.
        ratio = torch.log(distances.float() / exact) / math.log(p.max_distance / exact)
        far = (exact + (ratio * (count - exact)).to(distances.dtype)).clamp(max=count - 1)
        return base + torch.where(distances < exact, distances, far)

    def _span(self) -> tuple[int, int]:
        """Returns distances before and behind which all have one bucket: nearer than `max_distance`, and the nearer,
        the more of a row is far off."""
        p = self.params
        count = p.num_buckets // 2 if p.bidirectional else p.num_buckets
        exact = count // 2
        start = exact * (p.max_distance / exact) ** ((count - exact - 1) / (count - exact))
        # One more, as the edge of a bucket is found in float32.
        reach = min(p.max_distance, math.ceil(start) + 1)
        return -reach, reach if p.bidirectional else 0

    def by_distance(self, distances: Tensor) -> Tensor:
        """Returns the bias [N, L] of `distances` [L], key place minus query place."""
        return functional.embedding(self.buckets(distances), self.weight).t()

    def relative(self, *, device: torch.device) -> RelativeBias:
        """Returns the bias of all distances."""
        first, last = self._span()
        return RelativeBias(table=self.by_distance(torch.arange(first, last + 1, device=device)), first=first)


class Alibi(PositionBias):
    """A fixed slope for each head times the distance (Press et al. 2022); both directions alike when bidirectional."""

    class Params(PositionBias.Params):
        pass

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._slopes = torch.tensor(alibi_slopes(p.num_heads), dtype=torch.float32)

    def divide(self, ranks: Ranks) -> None:
        """Keeps the slopes of this rank's heads."""
        super().divide(ranks)
        if "heads" in ranks.divided:
            start, stop = ranks.span(self.params.num_heads)
            self._slopes = self._slopes[start:stop]

    def by_distance(self, distances: Tensor) -> Tensor:
        """Returns the bias [N, L] of `distances` [L], key place minus query place."""
        slopes = self._slopes.to(distances.device)
        return -slopes.unsqueeze(1) * distances.abs().to(slopes.dtype)

    def relative(self, *, device: torch.device) -> RelativeBias:
        """Returns the bias of all distances."""
        return RelativeBias(slopes=self._slopes.to(device))


def alibi_slopes(num_heads: int) -> list[float]:
    """Returns the slope of each head: powers of 2^(-8/n), filled up from those of 2n when n is no power of two."""
    closest = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / closest) for i in range(closest)]
    extra = [2.0 ** (-4.0 * (i + 1) / closest) for i in range(0, 2 * (num_heads - closest), 2)]
    return slopes + extra
