"""A bias of attention scores that is a function of how far apart query and key stand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaseq.kernels.attention.bias_table import LOG2_E, readable_table
from megaseq.kernels.checks import check_device, check_floating, check_shape, fail


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias for each head and distance: T5's (Raffel et al. 2020) as a table, ALiBi (Press et al. 2022) as slopes.

    The distance is the key's place minus the query's, and the last query stands at the last key: query t of T and key s
    of S are `s - t - (S - T)` apart. Give the same object to all layers of a stack: what `dense` and `readable` return
    is kept.
    """

    table: Tensor | None = None
    """[N, W]: the biases of the W distances from `first` on; it may need a gradient. Distances beyond either end have
    the bias of that end."""
    first: int = 0
    """Distance of the table's first column."""
    slopes: Tensor | None = None
    """[N]: in place of a table, minus slope times the distance's magnitude; fixed numbers, without gradient."""
    _dense: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    _readable: dict[tuple[int, bool], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    def check(self, *, num_heads: int, like: Tensor) -> None:
        """Checks that the bias belongs to queries of `num_heads` heads on the device of `like`.

        Raises:
            KernelError: if it has both a table and slopes or neither, or one of another shape or kind.
        """
        op = "attention"
        if (self.table is None) == (self.slopes is None):
            came = "neither" if self.table is None else "both"
            raise fail("bias", op=op, expected="have a table or slopes", came=came, remedy="Give one of them")
        given, name = (self.slopes, "bias.slopes") if self.table is None else (self.table, "bias.table")
        if given is None:
            return
        check_floating(given, op=op, argument=name)
        check_device(given, op=op, argument=name, other=like, other_name="query")
        if self.table is None:
            check_shape(given, op=op, argument=name, shape=(num_heads,), legend="[N]")
            if given.requires_grad:
                raise fail(name, op=op, expected="need no gradient", came="trained", remedy="Give a table instead")
            return
        check_shape(given, op=op, argument=name, shape=(num_heads, None), legend="[N, W]")
        if given.shape[1] == 0:
            raise fail(name, op=op, expected="have a column", came=list(given.shape), remedy="Leave the bias out")

    def of_heads(self, start: int, stop: int) -> RelativeBias:
        """Returns the bias of the heads from `start` to before `stop`."""
        table, slopes = (None if given is None else given[start:stop] for given in (self.table, self.slopes))
        return RelativeBias(table=table, first=self.first, slopes=slopes)

    def as_table(self, *, length: int) -> tuple[Tensor, int]:
        """Returns a table that holds for a row of `length` against itself, and the distance of its first column."""
        if self.table is not None:
            return self.table, self.first
        return self._by_distance(1 - length, max(length, 1)), 1 - length

    def readable(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns what Triton's kernels read: (`readable_table` of the table or None, slopes of base 2 or None).

        It is made at the first call, and again once the table has changed. A parameter that is itself the table may be
        changed in ways that do not show, and its readable form is not kept.
        """
        given = self.slopes if self.table is None else self.table
        if given is None or (given.is_leaf and given.requires_grad) or torch.compiler.is_compiling():
            return self._make_readable()
        key = (0 if given.is_inference() else given._version, torch.is_grad_enabled())
        kept = self._readable.get(key)
        if kept is None:
            self._readable.clear()
            kept = self._readable[key] = self._make_readable()
        return kept

    def _make_readable(self) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.table is None else readable_table(self.table),
            None if self.slopes is None else self.slopes.float() * LOG2_E,
        )

    def dense(self, *, query_length: int, key_length: int) -> Tensor:
        """Returns the bias of every pair, [1, N, T, S], made at the first call."""
        sizes = (query_length, key_length)
        kept = self._dense.get(sizes)
        if kept is None:
            kept = self._dense[sizes] = self._make_dense(*sizes)
        return kept

    def _make_dense(self, query_length: int, key_length: int) -> Tensor:
        values = self._by_distance(1 - key_length, query_length)
        if query_length == 0 or key_length == 0:
            # Of no element, and yet a function of the table.
            return values.sum(dim=1)[None, :, None, None].expand(-1, -1, query_length, key_length)
        # Windows of the T + S - 1 values are the rows, last query first.
        return values.unfold(1, key_length, 1).flip(1).unsqueeze(0)

    def _by_distance(self, start: int, stop: int) -> Tensor:
        """The bias [N, stop - start] of the distances from `start` to before `stop`."""
        stop = max(start, stop)
        if self.slopes is not None:
            distances = torch.arange(start, stop, device=self.slopes.device)
            return -self.slopes[:, None] * distances.abs().to(self.slopes.dtype)
        if self.table is None:
            raise fail("bias", op="attention", expected="have a table or slopes", came="neither", remedy="Give one")
        # Columns repeated and not gathered: that saves nothing for the backward pass, so a checkpointed layer may be
        # the one that makes the bias.
        last = self.first + self.table.shape[1]
        before = max(0, min(stop, self.first) - start)
        after = max(0, stop - max(start, last))
        inner = self.table[:, max(0, start - self.first) : max(0, stop - self.first)]
        return torch.cat([self.table[:, :1].expand(-1, before), inner, self.table[:, -1:].expand(-1, after)], dim=1)
