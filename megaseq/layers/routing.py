"""Which experts a token goes to: the router of a mixture of experts, its capacity and its auxiliary losses.

Everything is decided within a row of the batch: how many tokens an expert takes, and how even the load is. So the loss
does not depend on how rows are dealt out to micro-batches and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import FROM_PARENT, Problem
from megaseq.base.errors import must
from megaseq.kernels.dropout import mix_key
from megaseq.kernels.dropout.reference import uniform
from megaseq.layers.base import Layer
from megaseq.layers.initializers import Initializer, TruncatedGaussian
from megaseq.layers.tokens import Tokens, starts
from megaseq.parallel.spec import ContextRanks

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, weight) pairs without gradient, by name."""
Method = Literal["top1", "top2", "expert_choice"]


@dataclasses.dataclass(frozen=True)
class Assignments:
    """What experts compute: pairs of a token and an expert, sorted by expert."""

    tokens: Tensor
    """int64 [A], numbers of tokens among the B * T of the activation."""
    experts: Tensor
    """int64 [A], rising."""
    gates: Tensor
    """[A], factor of the expert's output."""
    counts: Tensor
    """int64 [E], pairs of each expert."""


class Router(Layer):
    """Scores every token for every expert, in at least float32, and pairs them up.

    `top1`: a token goes to its best expert, whose output is scaled by the softmax (Fedus et al. 2021); `top2`: to its
    best two, scaled by their share of both (Lepikhin et al. 2020); `expert_choice`: every expert takes its best tokens
    (Zhou et al. 2022), which, reading later tokens, is not for decoders.
    """

    class Params(Layer.Params):
        model_dim: int = FROM_PARENT
        """Width D."""
        num_experts: int = FROM_PARENT
        """Experts E."""
        method: Method = "top2"
        """Who chooses whom."""
        capacity_factor: float | None = None
        """Tokens that an expert takes of a row, as a multiple of an even share; those beyond go past the block. None:
        no limit; `expert_choice` needs a number, the average of experts a token. Outside training there is no limit on
        `top1` and `top2`."""
        balance_loss: float = 0.01
        """Factor of E * sum over experts of (share of a row's tokens whose first choice it is) * (mean probability in
        the row), averaged over tokens (Fedus et al. 2021, equation 4); not for `expert_choice`, which is balanced."""
        z_loss: float = 0.001
        """Factor of logsumexp(logits)^2, averaged over tokens (Zoph et al. 2022, equation 5)."""
        jitter: float = 0.0
        """In training the router reads its input times numbers uniform in [1 - jitter, 1 + jitter] (Fedus et al.)."""
        init: Initializer.Params = TruncatedGaussian.Params()
        """First values of the scores' matrix [E, D]."""

        def validate(self) -> Iterator[Problem | str]:
            """Refuses counts and factors out of range."""
            yield from super().validate()
            for name in ("balance_loss", "z_loss"):
                if getattr(self, name) < 0:
                    yield f"{name}: must not be negative, but is {getattr(self, name)}. Use 0 for none."
            if not 0 <= self.jitter < 1:
                yield f"jitter: must be in [0, 1), but is {self.jitter}. 0.01 is usual, 0 is none."
            if self.capacity_factor is not None and self.capacity_factor <= 0:
                yield f"capacity_factor: must be above 0, but is {self.capacity_factor}. Use 1.25, or null for none."
            if self.method == "expert_choice" and self.capacity_factor is None:
                yield "capacity_factor: must be a number with expert_choice, but is null. 2 is usual."
            wanted = 2 if self.method == "top2" else 1
            if isinstance(self.num_experts, int) and self.num_experts < wanted:
                yield f"num_experts: must be at least {wanted} with {self.method}, but is {self.num_experts}. Use 8."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.weight = self.create_parameter(
            "weight", shape=(p.num_experts, p.model_dim), axes=(None, "model"), init=p.init.instantiate()
        )

    @property
    def choices(self) -> float:
        """Experts that a token goes through, on average at most."""
        p = self.params
        if p.method == "expert_choice":
            return p.capacity_factor or 1.0
        return (2 if p.method == "top2" else 1) * min(p.capacity_factor or 1.0, 1.0)

    def share_rows(self, ranks: ContextRanks) -> None:
        """Refuses decisions that need all tokens of a row.

        Raises:
            ParamsError: the capacity of an expert is a share of the row's tokens.
        """
        if self.params.capacity_factor is not None:
            raise must(
                "router.capacity_factor",
                "be null (no limit) where context ranks share rows",
                self.params.capacity_factor,
                "Set router.capacity_factor=null and router.method=top2, or parallel.context=1",
            )

    def forward(
        self,
        x: Tensor,
        *,
        real: Tensor | None,
        tokens: Tokens | None = None,
        sum_over_row: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Metrics]]:
        """Pairs the tokens of `x` [B, T, D] with experts.

        Args:
            x: what the block reads.
            real: bool [B, T], False for padding, which goes to no expert and counts for nothing; None: none.
            tokens: which rows and tokens `x` holds; None: the context's rows, whole.
            sum_over_row: sums over the ranks that share rows; None where all tokens of a row are here.

        Returns:
            The fields of `Assignments` and of `AuxiliaryLoss`: not the objects, because ZeRO stage 3 has the weights
            ready for the backward pass of those tensors that it finds in tuples.
        """
        p = self.params
        logits = self._logits(x, tokens=tokens)
        probabilities = logits.softmax(dim=-1)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        if p.method == "expert_choice":
            chosen = _experts_choose(probabilities.detach(), real=real, factor=p.capacity_factor or 1.0)
            kept, gates, first = chosen, probabilities, probabilities.argmax(dim=-1)
            wanted = kept.sum()
        else:
            number = 2 if p.method == "top2" else 1
            best, experts = probabilities.topk(number, dim=-1)
            best = best / best.sum(dim=-1, keepdim=True) if number == 2 else best
            pairs = functional.one_hot(experts, p.num_experts).bool() & real[..., None, None]
            wanted = pairs.sum()
            if p.capacity_factor is not None and self.training:
                pairs = _within_capacity(pairs, real=real, factor=p.capacity_factor)
            # The experts of a token are distinct, so (token, expert) names a pair.
            kept, first = pairs.any(dim=2), experts[..., 0]
            gates = (pairs * best.unsqueeze(-1)).sum(dim=2)
        assignments = _sorted_by_expert(kept, gates=gates)
        load = self._load(first, real=real, dtype=logits.dtype)
        whole = load if sum_over_row is None else sum_over_row(load)
        loss, metrics = self._losses(logits, probabilities=probabilities, real=real, load=whole)
        count = wanted.to(logits.dtype)
        metrics["experts_dropped"] = (count - kept.sum(), count)
        return assignments, (loss, metrics)

    def _logits(self, x: Tensor, *, tokens: Tokens | None) -> Tensor:
        """Returns the scores [B, T, E]; half precision would send tokens to other experts at random."""
        precise = torch.promote_types(x.dtype, torch.float32)
        x = x.to(precise)
        if self.training and self.params.jitter:
            offset = starts(x, tokens=tokens or self.tokens_of(x))
            noise = uniform(x, key=mix_key(self.dropout_key()), start=offset)
            x = x * (1.0 + self.params.jitter * (2.0 * noise - 1.0))
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, self.weight.to(precise))

    def _load(self, first: Tensor, *, real: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [B, E + 1]: how many real tokens of a row have each expert as `first` choice, and their number."""
        chosen = (functional.one_hot(first, self.params.num_experts) * real.unsqueeze(-1)).sum(dim=1)
        return torch.cat([chosen, real.sum(dim=1, keepdim=True)], dim=1).to(dtype)

    def _losses(
        self, logits: Tensor, *, probabilities: Tensor, real: Tensor, load: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Returns the auxiliary loss summed over real tokens, and metrics: both losses, and the load of a row's busiest
        expert as a multiple of an even load. `load` is that of the whole rows."""
        p = self.params
        mask = real.to(logits.dtype)
        number, own = mask.sum(), mask.sum(dim=1, keepdim=True)
        # Counts have no gradient, and the loss is linear in the probabilities: ranks that share a row, each with its
        # own tokens' probabilities and the whole row's counts, add up to the loss of the row.
        shares = load[:, :-1] / load[:, -1:].clamp_min(1.0)
        balance = p.num_experts * ((probabilities * mask.unsqueeze(-1)).sum(dim=1) * shares).sum()
        z_loss = (logits.logsumexp(dim=-1).square() * mask).sum()
        loss = p.z_loss * z_loss if p.z_loss else torch.zeros_like(number)
        busiest = (shares.max(dim=1, keepdim=True).values * p.num_experts * own).sum()
        metrics = {"experts_load": (busiest, number), "router_z_loss": (z_loss.detach(), number)}
        if p.method != "expert_choice":
            loss = loss + p.balance_loss * balance
            metrics["balance_loss"] = (balance.detach(), number)
        return loss, metrics


def _within_capacity(pairs: Tensor, *, real: Tensor, factor: float) -> Tensor:
    """Drops pairs beyond the experts' capacity; bool [B, T, K, E] of pairs, K choices a token in order.

    First choices go before second ones, earlier tokens before later ones (Lepikhin et al. 2020, algorithm 1).
    """
    batch, length, choices, experts = pairs.shape
    queue = pairs.transpose(1, 2).reshape(batch, choices * length, experts)
    place = queue.int().cumsum(dim=1).view(batch, choices, length, experts).transpose(1, 2)
    return pairs & (place <= _capacity(real, factor=factor * choices / experts)[:, None, None, None])


def _experts_choose(probabilities: Tensor, *, real: Tensor, factor: float) -> Tensor:
    """Returns which tokens [B, T] each expert takes of `probabilities` [B, T, E]: bool [B, T, E]."""
    scores = probabilities.masked_fill(~real.unsqueeze(-1), -1.0)
    # A stable sort: of equal scores the earlier token goes first.
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, _places(order))
    capacity = _capacity(real, factor=factor / probabilities.shape[2])
    return (rank < capacity[:, None, None]) & real.unsqueeze(-1)


def _places(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None, :, None].expand_as(like)


def _capacity(real: Tensor, *, factor: float) -> Tensor:
    """Returns the tokens that an expert takes of each row, int64 [B]: `factor` of the real ones, rounded up."""
    # float64 and a hair less: 1.2 * 5 tokens must not round up to 7.
    return (real.sum(dim=1).double() * factor - 1e-9).ceil().long().clamp_min(1)


def _sorted_by_expert(kept: Tensor, *, gates: Tensor) -> tuple[Tensor, ...]:
    """Lists the pairs of `kept` bool [B, T, E], expert by expert, tokens in order, with their `gates` [B, T, E].

    Returns:
        The fields of `Assignments`.
    """
    number = kept.shape[2]
    by_expert = kept.flatten(0, 1).t()
    experts, tokens = by_expert.nonzero(as_tuple=True)
    return tokens, experts, gates.flatten(0, 1)[tokens, experts], torch.bincount(experts, minlength=number)


class PerExpert(Initializer):
    """Gives every expert's matrix first values of its own, as a linear map outside a mixture would have them."""

    class Params(Initializer.Params):
        init: Initializer.Params = TruncatedGaussian.Params()
        """Of one expert."""

    params: Params

    def fill(self, tensor: Tensor, *, generator: torch.Generator, axes: Any) -> None:
        """Fills `tensor` [E, ...] expert by expert."""
        init = self.params.init.instantiate()
        for matrix in tensor.unbind(0):
            init.fill(matrix, generator=generator, axes=axes[1:])
