"""A mixture of experts in place of the position-wise block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from megaseq.base import REQUIRED
from megaseq.base.errors import must
from megaseq.kernels.dropout import dropout
from megaseq.kernels.grouped_linear import grouped_linear
from megaseq.layers.activations import activation
from megaseq.layers.auxiliary import AuxiliaryLoss
from megaseq.layers.base import Layer, inherit
from megaseq.layers.branch import Branch
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.initializers import Constant
from megaseq.layers.linear import Linear
from megaseq.layers.routing import Assignments, PerExpert, Router
from megaseq.layers.sight import Sight, inner_of, stream_of
from megaseq.layers.tokens import token_numbers
from megaseq.parallel.spec import Axis, Ranks


class Trip(Protocol):
    """Pairs of several ranks at the rank that holds their experts."""

    @property
    def x(self) -> Tensor:
        """[A', D], sorted by expert."""

    @property
    def counts(self) -> list[int]:
        """Pairs of each expert that is here."""

    @property
    def names(self) -> Tensor:
        """int64 [A'], the names of the pairs."""

    def back(self, y: Tensor) -> Tensor:
        """Returns the results [A, D] of the pairs that this rank sent, in their order; `y` [A', D] are those here."""


class ExpertRanks(Protocol):
    """The ranks that share the experts of a layer."""

    def send(self, x: Tensor, *, counts: Tensor, names: Tensor) -> Trip:
        """Sends pairs to the ranks that hold their experts.

        Args:
            x: [A, D], sorted by expert.
            counts: int64 [E], of each expert of the layer.
            names: int64 [A], which pair each is.
        """


class ExpertLinear(Layer):
    """A linear map for each expert."""

    class Params(Linear.Params):
        pass

    params: Params
    divisible = True
    _reads_a_part = False

    def __init__(self, p: Params, *, num_experts: int, axes: tuple[Axis, Axis]) -> None:
        super().__init__(p)
        if isinstance(p.bias, tuple) or p.part_inits:
            raise must("bias", "be one flag, and part_inits empty, in experts", p.bias, "Set one flag for all")
        self.weight = self.create_parameter(
            "weight",
            shape=(num_experts, p.output_dim, p.input_dim),
            axes=("expert", *axes),
            init=PerExpert.Params(init=p.init).instantiate(),
        )
        self.bias: nn.Parameter | None
        if p.bias:
            zeros = Constant.Params().instantiate()
            self.create_parameter("bias", shape=(num_experts, p.output_dim), axes=("expert", axes[0]), init=zeros)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, *, counts: list[int]) -> Tensor:
        """Maps pairs `x` [A, input_dim], sorted by expert, `counts` of each, to [A, output_dim]."""
        y = grouped_linear(x, weight=self.weight, counts=counts)
        if self.ranks is not None and self._reads_a_part:
            y = self.ranks.sum(y)
        if self.bias is None:
            return y
        repeats = torch.tensor(counts, device=y.device)
        return y + self.bias.to(y.dtype).repeat_interleave(repeats, dim=0, output_size=y.shape[0])

    def divide(self, ranks: Ranks) -> None:
        """Learns whether the inputs are divided over the tensor ranks."""
        super().divide(ranks)
        self._reads_a_part = self.weight.shape[2] < self.params.input_dim


class MixtureOfExperts(Branch):
    """Several feed-forward blocks, of which each token goes through a few; in a residual branch.

    y = sum over the token's experts of gate_e * down_e(act(up_e(x))), or gated as in `FeedForward`; `Router` says who
    goes where. Tokens that no expert takes pass through the residual stream alone.
    """

    class Params(FeedForward.Params):
        num_experts: int = REQUIRED
        """Experts E, each a block of width `hidden_dim`."""
        router: Router.Params = Router.Params()
        """Pairs tokens with experts."""

        def validate(self) -> Iterator[str]:
            """Refuses a layer without experts."""
            yield from super().validate()
            if isinstance(self.num_experts, int) and self.num_experts < 1:
                yield f"num_experts: must be at least 1, but is {self.num_experts}. 8 is usual."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.router: Router = inherit(p.router, model_dim=p.model_dim, num_experts=p.num_experts).instantiate()
        self.gate: ExpertLinear | None = self._map(p.up, "hidden") if p.gated else None
        self.up = self._map(p.up, "hidden")
        self.down = self._map(p.down, "model")
        self.activation = activation(p.activation)
        self.expert_ranks: ExpertRanks | None = None
        self._columns = (0, p.hidden_dim)

    def divide(self, ranks: Ranks) -> None:
        """Learns which hidden units of every expert are here."""
        super().divide(ranks)
        if "hidden" in ranks.divided:
            self._columns = (ranks.span(self.params.hidden_dim)[0], self.params.hidden_dim)

    def _map(self, params: Linear.Params, output: Axis) -> ExpertLinear:
        p = self.params
        widths = (p.hidden_dim, p.model_dim) if output == "hidden" else (p.model_dim, p.hidden_dim)
        shared = {name: getattr(params, name) for name in ("bias", "init", "part_inits")}
        own = ExpertLinear.Params(output_dim=widths[0], input_dim=widths[1], **shared)
        axes: tuple[Axis, Axis] = ("hidden", "model") if output == "hidden" else ("model", "hidden")
        made: ExpertLinear = inherit(own, bias=p.bias).instantiate(num_experts=p.num_experts, axes=axes)
        return made

    def forward(self, x: Tensor, *, sight: Sight | None = None) -> Tensor:
        """Maps the residual stream `x` [B, T, D] to the next [B, T, D].

        Args:
            x: the stream.
            sight: which tokens these are, and which of them are padding; None: all of the context's rows, and real.
        """
        tokens, stream = inner_of(sight) or self.tokens_of(x), stream_of(sight)
        entered = self.enter(x, tokens=stream)
        divided = self.ranks is not None and stream is not None and stream.divided
        if self.ranks is not None and divided:
            # The router wants all tokens of a row; what follows is the same on all ranks but for the experts.
            entered = self.ranks.join_tokens(entered, partial=False)
        batch, length, width = entered.shape
        segment_ids = None if sight is None else sight.segment_ids
        real = None if segment_ids is None else segment_ids > 0
        total = None if sight is None or sight.row is None else sight.row.ranks.sum
        found, losses = self.router(entered, real=real, tokens=tokens, sum_over_row=total)
        pairs = Assignments(*found)
        if self.context.auxiliary is not None:
            self.context.auxiliary.append(AuxiliaryLoss(*losses))
        names = token_numbers(tokens, batch=batch, count=length, device=x.device).flatten()[pairs.tokens]
        names = names * self.params.num_experts + pairs.experts
        rows = entered.flatten(0, 1).index_select(0, pairs.tokens)
        if self.ranks is not None:
            rows = self.ranks.copy(rows)
        if self.expert_ranks is None:
            y = self.experts(rows, counts=pairs.counts.tolist(), names=names)
        else:
            trip = self.expert_ranks.send(rows, counts=pairs.counts, names=names)
            y = trip.back(self.experts(trip.x, counts=trip.counts, names=trip.names))
        y = y * pairs.gates.to(y.dtype).unsqueeze(1)
        y = y.new_zeros(batch * length, width).index_add(0, pairs.tokens, y).view(batch, length, width)
        if self.ranks is not None and divided:
            y = self.ranks.cut_tokens(y)
        return self.leave(x, y, tokens=stream)

    def experts(self, x: Tensor, *, counts: list[int], names: Tensor) -> Tensor:
        """Runs pairs `x` [A, D], sorted by expert, through this rank's experts; returns [A, D].

        Args:
            x: the pairs.
            counts: of each expert that is here.
            names: int64 [A], number of the token in the step's batch times E plus the expert: dropout depends on it.
        """
        hidden = self.activation((self.gate or self.up)(x, counts=counts))
        if self.gate is not None:
            hidden = hidden * self.up(x, counts=counts)
        if self.training and self.params.activation_dropout:
            hidden = self.drop_hidden(hidden, names=names)
        out: Tensor = self.down(hidden, counts=counts)
        return out

    def drop_hidden(self, hidden: Tensor, *, names: Tensor) -> Tensor:
        """Returns the hidden units [A, F] of pairs with `names` [A], some of them zero."""
        rate, key = self.params.activation_dropout, self.dropout_key(site=1)
        return dropout(hidden, rate=rate, key=key, offset=names * self._columns[1] + self._columns[0])
