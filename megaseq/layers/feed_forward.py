"""The position-wise block."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megaseq.base import FROM_PARENT, REQUIRED
from megaseq.kernels.activation import gated_activation
from megaseq.layers.activations import ActivationName
from megaseq.layers.base import inherit
from megaseq.layers.branch import Branch
from megaseq.layers.linear import Linear
from megaseq.layers.sight import Sight, inner_of, stream_of
from megaseq.parallel.spec import Ranks, shard_of


class FeedForward(Branch):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated (Shazeer 2020), in a residual branch."""

    class Params(Branch.Params):
        hidden_dim: int = REQUIRED
        """Width F between the two projections."""
        activation: ActivationName = "relu"
        """The nonlinearity."""
        gated: bool = False
        """Whether a second projection is multiplied in; it is fused with the first, gate before up."""
        activation_dropout: float = FROM_PARENT
        """Chance of zeroing an element after the activation, in training."""
        up: Linear.Params = Linear.Params()
        """D to F, or to 2F when gated."""
        down: Linear.Params = Linear.Params()
        """F to D."""

        def validate(self) -> Iterator[str]:
            """Refuses a width below one."""
            yield from super().validate()
            if isinstance(self.hidden_dim, int) and self.hidden_dim < 1:
                yield f"hidden_dim: must be at least 1, but is {self.hidden_dim}. 4 times model_dim is usual."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        parts = (p.hidden_dim, p.hidden_dim) if p.gated else ()
        up = inherit(p.up, input_dim=p.model_dim, output_dim=sum(parts) or p.hidden_dim, bias=p.bias)
        self.up: Linear = up.instantiate(axes=("hidden", "model"), parts=parts)
        down = inherit(p.down, input_dim=p.hidden_dim, output_dim=p.model_dim, bias=p.bias)
        self.down: Linear = down.instantiate(axes=("model", "hidden"))
        # (first, F) of the hidden units that are here, where tensor ranks share them.
        self.columns: tuple[int, int] | None = None

    def divide(self, ranks: Ranks) -> None:
        """Learns which hidden units are here."""
        super().divide(ranks)
        shard = shard_of(self.down.weight)
        if shard is not None:
            self.columns = (shard.boxes[0].start[1], self.params.hidden_dim)

    def forward(self, x: Tensor, *, sight: Sight | None = None) -> Tensor:
        """Maps the residual stream `x` [B, T, D] to the next [B, T, D]; `sight` says which tokens these are."""
        tokens = stream_of(sight)
        hidden = self.up(self.enter(x, tokens=tokens), tokens=tokens)
        hidden = gated_activation(hidden, name=self.params.activation, gated=self.params.gated)
        rate = self.params.activation_dropout
        hidden = self.drop(hidden, rate=rate, site=1, tokens=inner_of(sight), columns=self.columns)
        return self.leave(x, self.down(hidden, tokens=tokens), tokens=tokens)
