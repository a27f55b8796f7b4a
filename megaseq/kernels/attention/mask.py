"""Who may attend to whom, built once per batch and shared by all layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megaseq.kernels.attention.ranges import SegmentRanges, segment_ranges
from megaseq.kernels.attention.segments import SegmentPlan, plan_segments
from megaseq.kernels.checks import check_device, check_shape, fail

Shortcut = Literal["full", "causal"]

_UNSET = object()


class AttentionMask:
    """Which key each query may see.

    A query at (row b, place t) sees the key at (b, s) if all of these hold:

    - their segment ids are equal and not 0 (0 marks padding); where only one side has segment ids, that one is not 0;
    - `causal`: the key's position is not after the query's;
    - `window`: their positions are less than `window` apart.

    A query that sees nothing (a pad) gets zeros from `attention`, and its gradients are zero.

    Everything derived from this is computed at first use and kept, so give the same object to all layers of a stack.
    The tensors must not change afterwards.
    """

    def __init__(
        self,
        *,
        query_segment_ids: Tensor | None = None,
        key_segment_ids: Tensor | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        """Describes a mask; nothing is computed yet.

        Args:
            query_segment_ids: [B, T], 1-based, 0 for padding. None: no query is padding.
            key_segment_ids: [B, S], likewise.
            query_positions: [B or 1, T]; None: places in the row, the last query at the last key.
            key_positions: [B or 1, S]; None: places in the row.
            causal: hide keys after the query.
            window: hide keys that are `window` or more positions away.

        Raises:
            KernelError: if `window` is below 1, or a tensor is not a matrix of integers.
        """
        if window is not None and window < 1:
            raise fail(
                "window", op="attention mask", expected="be at least 1", came=window, remedy="Use None for no window"
            )
        tensors = {
            "query_segment_ids": query_segment_ids,
            "key_segment_ids": key_segment_ids,
            "query_positions": query_positions,
            "key_positions": key_positions,
        }
        for name, tensor in tensors.items():
            if tensor is not None:
                check_shape(tensor, op="attention mask", argument=name, shape=(None, None), legend="[B, length]")
                if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                    raise fail(
                        name, op="attention mask", expected="be integers", came=tensor.dtype, remedy="Cast it before"
                    )
        self.query_segment_ids = query_segment_ids
        self.key_segment_ids = key_segment_ids
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.causal = causal
        self.window = window
        self._allowed: dict[tuple[int, int], Tensor] = {}
        self._additive: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._biased: tuple[Tensor, Tensor] | None = None
        self._shortcuts: dict[tuple[int, int], Shortcut | None] = {}
        self._ranges: dict[tuple[int, int], SegmentRanges] = {}
        self._plan: object = _UNSET

    def check(self, *, query: Tensor, key_length: int) -> None:
        """Checks that the mask belongs to a query [B, T, ...] and a key [B, key_length, ...].

        Raises:
            KernelError: if a tensor of the mask has another shape or is on another device than the query.
        """
        batch, query_length = query.shape[:2]
        wanted = (
            ("mask.query_segment_ids", self.query_segment_ids, (batch,), query_length),
            ("mask.key_segment_ids", self.key_segment_ids, (batch,), key_length),
            ("mask.query_positions", self.query_positions, (1, batch), query_length),
            ("mask.key_positions", self.key_positions, (1, batch), key_length),
        )
        for name, tensor, rows, length in wanted:
            if tensor is None:
                continue
            # Compared one by one: in a graph of any sizes nobody knows whether a symbol is in a tuple.
            if not (tensor.shape[1] == length and (tensor.shape[0] == rows[0] or tensor.shape[0] == rows[-1])):
                check_shape(tensor, op="attention", argument=name, shape=(rows, length), legend="[B, length]")
            check_device(tensor, op="attention", argument=name, other=query, other_name="query")

    def allowed(self, *, query_length: int, key_length: int, device: torch.device) -> Tensor:
        """True where a query sees a key: bool [B or 1, 1, T, S]."""
        kept = self._allowed.get((query_length, key_length))
        if kept is not None:
            return kept
        allowed = torch.ones((1, 1, 1), dtype=torch.bool, device=device)
        query_ids, key_ids = self.query_segment_ids, self.key_segment_ids
        if query_ids is not None and key_ids is not None:
            allowed = (query_ids[:, :, None] == key_ids[:, None, :]) & (query_ids != 0)[:, :, None]
        elif key_ids is not None:
            allowed = (key_ids != 0)[:, None, :]
        elif query_ids is not None:
            allowed = (query_ids != 0)[:, :, None]
        if self.causal or self.window is not None:
            key_places = torch.arange(key_length, device=device)[None]
            query_places = torch.arange(key_length - query_length, key_length, device=device)[None]
            queries = query_places if self.query_positions is None else self.query_positions
            keys = key_places if self.key_positions is None else self.key_positions
            distance = queries[:, :, None] - keys[:, None, :]
            if self.causal:
                allowed = allowed & (distance >= 0)
            if self.window is not None:
                allowed = allowed & (distance.abs() < self.window)
        allowed = allowed.expand(-1, query_length, key_length)[:, None]
        self._allowed[(query_length, key_length)] = allowed
        return allowed

    def additive(self, dtype: torch.dtype, *, query_length: int, key_length: int, device: torch.device) -> Tensor:
        """0 where a query sees a key and minus infinity elsewhere: `dtype` [B or 1, 1, T, S]."""
        key = (query_length, key_length, dtype)
        kept = self._additive.get(key)
        if kept is None:
            allowed = self.allowed(query_length=query_length, key_length=key_length, device=device)
            kept = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))
            self._additive[key] = kept
        return kept

    def biased(self, bias: Tensor, *, dtype: torch.dtype, query_length: int, key_length: int) -> Tensor:
        """`additive` plus `bias`, kept for the next layer that brings the same bias tensor: [B, N, T, S].

        T5 shares one bias among its layers, so the sum is made once per stack, and its gradient is summed once.
        """
        if self._biased is not None and self._biased[0] is bias:
            return self._biased[1]
        additive = self.additive(dtype, query_length=query_length, key_length=key_length, device=bias.device)
        total = bias.to(dtype) + additive
        self._biased = (bias, total)
        return total

    def shortcut(self, *, query_length: int, key_length: int) -> Shortcut | None:
        """Says "full" if every query sees every key, "causal" if it is exactly the lower triangle, None if neither.

        It reads the tensors, so it answers only in host memory, on an accelerator it would wait for the device; and not
        in a graph, which is to hold for other tensors too.
        """
        key = (query_length, key_length)
        if key not in self._shortcuts:
            self._shortcuts[key] = self._find_shortcut(query_length, key_length)
        return self._shortcuts[key]

    def plan(self) -> SegmentPlan | None:
        """The rows' segments as separate short sequences, or None where the mask cannot be cut up that way."""
        if self._plan is _UNSET:
            self._plan = self._find_plan()
        return self._plan if isinstance(self._plan, SegmentPlan) else None

    def ranges(self, *, query_length: int, key_length: int) -> SegmentRanges | None:
        """The segments as kernels read them; None without any."""
        query_ids, key_ids = self.query_segment_ids, self.key_segment_ids
        # Ids on one side only mark padding: the other side, and all that is no padding, is one segment.
        if query_ids is None and key_ids is not None:
            key_ids = (key_ids != 0).to(torch.int32)
            query_ids = key_ids.new_ones((key_ids.shape[0], query_length))
        elif key_ids is None and query_ids is not None:
            query_ids = (query_ids != 0).to(torch.int32)
            key_ids = query_ids.new_ones((query_ids.shape[0], key_length))
        if query_ids is None or key_ids is None:
            return None
        if (query_length, key_length) not in self._ranges:
            self._ranges[(query_length, key_length)] = segment_ranges(query_ids, key_ids=key_ids)
        return self._ranges[(query_length, key_length)]

    def _find_shortcut(self, query_length: int, key_length: int) -> Shortcut | None:
        tensors = (self.query_segment_ids, self.key_segment_ids, self.query_positions, self.key_positions)
        given = [tensor for tensor in tensors if tensor is not None]
        if given and (torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in given)):
            return None
        if self.window is not None and self.window < max(query_length, key_length):
            return None
        if not self._one_segment():
            return None
        if not self.causal:
            # A window at least as wide as the row hides nothing, if positions are places.
            return "full" if self.window is None or self._positions_are_places(query_length, key_length) else None
        if query_length == key_length and self._positions_are_places(query_length, key_length):
            return "causal"
        return None

    def _one_segment(self) -> bool:
        """Whether no row holds padding or a second segment."""
        rows = [ids for ids in (self.query_segment_ids, self.key_segment_ids) if ids is not None]
        if not rows:
            return True
        if any(ids.shape[1] == 0 for ids in rows):
            return False
        first = rows[0][:, :1]
        # With segment ids on one side only, ids need not agree with each other: they only mark padding.
        if len(rows) == 1:
            return bool((rows[0] != 0).all())
        return bool((first != 0).all()) and all(bool((ids == first).all()) for ids in rows)

    def _positions_are_places(self, query_length: int, key_length: int) -> bool:
        """Whether comparing positions is the same as comparing places in the row."""
        queries, keys = self.query_positions, self.key_positions
        if queries is None and keys is None:
            return True
        places = torch.arange(key_length)[None]
        queries = places[:, key_length - query_length :] if queries is None else queries
        keys = places if keys is None else keys
        if query_length != key_length:
            return False
        return bool((queries == keys).all()) and bool((keys - keys[:, :1] == places).all())

    def _find_plan(self) -> SegmentPlan | None:
        query_ids, key_ids = self.query_segment_ids, self.key_segment_ids
        if query_ids is None or key_ids is None or self.window is not None or query_ids.device.type != "cpu":
            return None
        if torch.compiler.is_compiling():
            return None
        if self.causal and not (query_ids is key_ids or torch.equal(query_ids, key_ids)):
            return None
        if self.causal and (self.query_positions is not None or self.key_positions is not None):
            # Positions that restart in every segment order a segment as its places do; any other positions do not.
            if self.query_positions is None or self.key_positions is None:
                return None
            if not (
                self.query_positions is self.key_positions or torch.equal(self.query_positions, self.key_positions)
            ):
                return None
            rising = self.query_positions.diff(dim=1) == 1
            inside = (query_ids.diff(dim=1) == 0) & (query_ids[:, 1:] != 0)
            if not bool((rising | ~inside).all()):
                return None
        return plan_segments(query_ids, key_segment_ids=key_ids, causal=self.causal)
