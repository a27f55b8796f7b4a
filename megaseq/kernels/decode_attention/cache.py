"""The keys and values that decoding has kept, wherever they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.kernels.checks import check_device, check_like, check_shape, fail

QUANTISED = (torch.int8, torch.float8_e4m3fn)
"""What a cache may hold beside the query's own dtype."""

_OP = "decode_attention"


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """Keys and values of M heads, in pages of C places.

    - Without `table`, page b holds source b's keys in order: an encoder's output, or a cache that is moved about.
    - `table` [B, W] lists the pages of each source, read by all its hypotheses: a paged encoder output.
    - `table` [B, K, W] lists the pages of each hypothesis: key j stands at place j % C of page table[b, k, j // C].
      With C = 1 it is a table of places, and reordering a beam is reordering its rows.

    Entries of the table, and places of a page, behind a row's length are not read.
    """

    key: Tensor
    """[X, C, M, H], with any strides: the query's dtype, or int8 or e4m3."""
    value: Tensor
    """[X, C, M, H], as `key`."""
    table: Tensor | None = None
    """int32 or int64, [B, W] or [B, K, W]; None: X = B, one page a source."""
    key_scale: Tensor | None = None
    """fp32 factor of a quantised key, [M] for each head or [X, C, M] for each token; None: 1."""
    value_scale: Tensor | None = None
    """Likewise for values; both are given, with the same shape, or neither is."""

    @property
    def own(self) -> bool:
        """Whether each hypothesis has keys of its own."""
        return self.table is not None and self.table.dim() == 3

    @property
    def capacity(self) -> int:
        """The most keys that a row can have."""
        pages = 1 if self.table is None else self.table.shape[-1]
        return pages * self.key.shape[1]

    def check(self, query: Tensor) -> None:
        """Checks that all tensors fit `query` [B, K, N, H] and each other.

        Raises:
            KernelError: if one does not.
        """
        batch, num_hyps, num_heads, width = query.shape
        key, value = self.key, self.value
        pages = batch if self.table is None else None
        check_shape(key, op=_OP, argument="key", shape=(pages, None, None, width), legend="[X, C, M, H]")
        check_shape(value, op=_OP, argument="value", shape=tuple(key.shape), legend="[X, C, M, H]")
        if key.dtype in QUANTISED:
            check_device(key, op=_OP, argument="key", other=query, other_name="query")
        else:
            check_like(key, op=_OP, argument="key", other=query, other_name="query")
        check_like(value, op=_OP, argument="value", other=key, other_name="key")
        if key.shape[2] == 0 or num_heads % key.shape[2]:
            raise fail(
                "key", op=_OP, expected=f"have a number of heads that divides the query's {num_heads}",
                came=key.shape[2], remedy="Choose num_key_value_heads so that it divides num_heads",
            )  # fmt: skip
        if self.table is not None:
            shape = (batch, num_hyps, None) if self.table.dim() == 3 else (batch, None)
            check_shape(self.table, op=_OP, argument="table", shape=shape, legend="[B, W] or [B, K, W]")
            check_integers(self.table, argument="table", query=query)
        self._check_scales()

    def _check_scales(self) -> None:
        pair = (("key_scale", self.key_scale), ("value_scale", self.value_scale))
        if (self.key_scale is None) != (self.value_scale is None):
            missing = "key_scale" if self.key_scale is None else "value_scale"
            raise fail(missing, op=_OP, expected="come with the other scale", came=None, remedy="Give both or neither")
        for name, scale in pair:
            if scale is None:
                continue
            if self.key.dtype not in QUANTISED:
                raise fail(
                    name, op=_OP, expected="be None for a cache that is not int8 or e4m3", came="a tensor",
                    remedy="Leave it out",
                )  # fmt: skip
            shape = (self.key.shape[2],) if scale.dim() == 1 else tuple(self.key.shape[:3])
            check_shape(scale, op=_OP, argument=name, shape=shape, legend="[M] or [X, C, M]")
            check_device(scale, op=_OP, argument=name, other=self.key, other_name="key")
            if scale.dtype is not torch.float32:
                raise fail(name, op=_OP, expected="be float32", came=scale.dtype, remedy="Cast it before the call")
        if self.key_scale is not None and self.value_scale is not None:
            wanted = tuple(self.key_scale.shape)
            check_shape(self.value_scale, op=_OP, argument="value_scale", shape=wanted, legend="of key_scale")


def check_pages(pages: Tensor, *, count: int) -> None:
    """Checks that entries of a table in host memory name pages of a cache of `count`; an accelerator's nobody sees
    without waiting.

    Raises:
        KernelError: if one does not.
    """
    if not pages.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(pages))
    if low < 0 or high >= count:
        raise fail(
            "table", op=_OP, expected=f"name pages in [0, {count}) as far as rows are long",
            came=low if low < 0 else high, remedy="Take the pages from the cache",
        )  # fmt: skip


def check_integers(tensor: Tensor, *, argument: str, query: Tensor) -> None:
    """Checks that `tensor` holds int32 or int64 on the device of `query`.

    Raises:
        KernelError: if it does not.
    """
    if tensor.dtype not in (torch.int32, torch.int64):
        raise fail(
            argument, op=_OP, expected="be int32 or int64", came=tensor.dtype, remedy=f"Cast {argument} before the call"
        )
    check_device(tensor, op=_OP, argument=argument, other=query, other_name="query")
