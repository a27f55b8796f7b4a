"""What a kernel does to memory while it is interpreted, and the faults in it.

Found, each with the kernel's name and the program's position in the grid:
- an access outside of the tensor that the pointer came from, also where another tensor lies there. To know where a
  pointer came from, its upper 16 bits, which are zero in addresses, carry the number of the tensor;
- two programs of a launch that touch one element, at least one of them with a plain store, unless one of them
  released and the other acquired a lock or counter (a scalar atomic that is not relaxed) in between;
- a store whose lanes write different values to one element;
- a load of what another lane of the program has stored, without `tl.debug_barrier()` between them.
"""

from __future__ import annotations

import bisect
import dataclasses
import mmap
from typing import Any

import numpy as np
import triton.language as tl

ADDRESS_BITS = 48
ADDRESS_MASK = np.uint64((1 << ADDRESS_BITS) - 1)
MANY = -1
"""Stands for several programs where one number has its place."""
RIVALS = {"load": ("atomics",), "store": ("loads", "atomics"), "atomic": ("loads",)}
"""By access: what other programs may not have done to the element; none may have stored to it."""
LAZY_BYTES = 1 << 28
"""Shadows larger than this are reserved without being counted against the machine's memory."""


class MemoryFault(Exception):
    """A kernel touched memory in a way that has no defined result on a GPU."""


@dataclasses.dataclass
class Buffer:
    """The bytes from the first to the last element of a tensor argument."""

    name: str
    low: int
    high: int
    item_size: int


class Shadow:
    """Who touched which element of some memory in this launch. 0 stands for nobody."""

    def __init__(self, *, low: int, high: int, item_size: int) -> None:
        self.low, self.high, self.item_size = low, high, item_size
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        """One number for each element: "stores" keeps epochs, "loads" and "atomics" keep programs."""
        if name not in self._arrays:
            count = (self.high - self.low) // self.item_size + 1
            if count * 4 < LAZY_BYTES:
                self._arrays[name] = np.zeros(count, np.int32)
            else:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
                self._arrays[name] = np.frombuffer(mmap.mmap(-1, count * 4, flags=flags), np.int32)
        return self._arrays[name]

    def touched(self, name: str) -> bool:
        """Whether anything was noted under `name`."""
        return name in self._arrays

    def elements(self, addresses: np.ndarray, *, size: int) -> np.ndarray:
        """Indices of the elements that accesses of `size` bytes at `addresses` touch."""
        index = (addresses - np.uint64(self.low)).astype(np.int64) // self.item_size
        if size <= self.item_size:
            return index
        return (index[:, None] + np.arange(size // self.item_size)).reshape(-1)


def element_size(pointers: Any) -> int:
    """Bytes of what the pointers point at."""
    kind = pointers.get_element_ty()
    return 8 if isinstance(kind, tl.pointer_type) else max(1, kind.primitive_bitwidth // 8)


class Memory:
    """The memory of one launch. One object serves all launches of a process, one after the other."""

    def __init__(self) -> None:
        self.begin("no kernel")

    def begin(self, kernel: str) -> None:
        """A launch starts: nothing is known of its tensors, nothing was touched."""
        self.kernel = kernel
        self.buffers: list[Buffer] = []
        self.position: tuple[int, int, int] = (0, 0, 0)
        self.program = 0
        self.epoch = 0
        self.owners = np.zeros(64, np.int32)  # Program of each epoch.
        self.released: dict[int, dict[int, int]] = {}  # By address of a lock: last epoch of each program that let go.
        self.seen: dict[int, int] = {}  # By program: the last epoch that the current program comes after.
        self.stored_blocks: set[tuple[tuple[int, ...], bytes]] = set()
        self._shadows: list[Shadow] = []

    def add(self, name: str, *, low: int, high: int, item_size: int) -> int:
        """Notes a tensor argument; returns what to add to its address to mark pointers to it."""
        self.buffers.append(Buffer(name, low, high, item_size))
        self._shadows = []
        return len(self.buffers) << ADDRESS_BITS

    def enter(self, position: tuple[int, int, int]) -> None:
        """The program at `position` of the grid starts."""
        self.position = position
        self.program += 1
        self.seen = {}
        self.advance()

    def advance(self) -> None:
        """What the program did before is over for all its lanes: it starts, or has a barrier."""
        self.epoch += 1
        if self.epoch >= len(self.owners):
            self.owners = np.concatenate([self.owners, np.zeros_like(self.owners)])
        self.owners[self.epoch] = self.program
        self.stored_blocks.clear()

    def plain_addresses(self, pointers: np.ndarray) -> np.ndarray:
        """Pointers without the mark of their tensor."""
        return pointers & ADDRESS_MASK

    def access(self, pointers: Any, *, mask: np.ndarray, what: str) -> np.ndarray:
        """Checks an access ("load", "store" or "atomic") and notes it; returns the addresses of all lanes."""
        marked = np.asarray(pointers.data)
        addresses = self.plain_addresses(marked)
        active = np.broadcast_to(mask, marked.shape)
        touched = addresses[active]
        if touched.size and self.buffers:
            size = element_size(pointers)
            shadow = self._in_bounds(marked[active], touched, size=size, what=what)
            self._note(shadow.elements(touched, size=size), shadow, what=what, block=addresses)
        return addresses

    def synchronise(self, address: int, *, acquire: bool, release: bool) -> None:
        """The program did an atomic operation on the lock or counter at `address`."""
        if acquire:
            for program, epoch in self.released.get(address, {}).items():
                self.seen[program] = max(epoch, self.seen.get(program, 0))
        if release:
            self.released.setdefault(address, {}).update({**self.seen, self.program: self.epoch})
        self.advance()

    def check_duplicates(self, addresses: np.ndarray, *, values: np.ndarray) -> None:
        """Finds lanes of a store that give one element different values.

        Args:
            addresses: of the lanes that store, flat.
            values: what they store, flat.
        """
        order = np.argsort(addresses, kind="stable")
        ordered, bits = addresses[order], np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
        if ((ordered[1:] == ordered[:-1]) & (bits[1:] != bits[:-1])).any():
            raise self._fault("lanes of one store write different values to one element")

    def _in_bounds(self, marked: np.ndarray, touched: np.ndarray, *, size: int, what: str) -> Shadow:
        marks = marked >> np.uint64(ADDRESS_BITS)
        first, last = int(marks.min()), int(marks.max())
        lowest, highest = int(touched.min()), int(touched.max()) + size
        if first == last and 0 < first <= len(self.buffers):
            buffer = self.buffers[first - 1]
            if lowest >= buffer.low and highest <= buffer.high:
                return self._shadow_of(lowest)
            outside = (touched < np.uint64(buffer.low)) | (touched + np.uint64(size) > np.uint64(buffer.high))
            offset = int(touched[outside][0]) - buffer.low
            raise self._fault(
                f"out-of-bounds {what} in {int(outside.sum())} lanes, first at byte {offset} of {buffer.name}, "
                f"which has {buffer.high - buffer.low}"
            )
        # Pointers that a kernel read from memory or computed from integers carry no mark.
        shadow = self._shadow_of(lowest) if first == last == 0 else None
        if shadow is None or not (shadow.low <= lowest and highest <= shadow.high):
            raise self._fault(f"out-of-bounds {what} at address {lowest:#x}, which is in no argument of the kernel")
        return shadow

    def _shadow_of(self, address: int) -> Shadow:
        if not self._shadows:
            self._shadows = self._merge()
        at = bisect.bisect_right([shadow.low for shadow in self._shadows], address) - 1
        return self._shadows[max(at, 0)]

    def _merge(self) -> list[Shadow]:
        """One shadow for tensors that overlap: views of one storage."""
        merged: list[Buffer] = []
        for buffer in sorted((b for b in self.buffers if b.high > b.low), key=lambda b: b.low):
            if merged and buffer.low < merged[-1].high:
                last = merged[-1]
                last.high, last.item_size = max(last.high, buffer.high), min(last.item_size, buffer.item_size)
            else:
                merged.append(dataclasses.replace(buffer))
        return [Shadow(low=b.low, high=b.high, item_size=b.item_size) for b in merged]

    def _note(self, index: np.ndarray, shadow: Shadow, *, what: str, block: np.ndarray) -> None:
        self._compare_stores(index, shadow, what=what, block=block)
        for name in RIVALS[what]:
            if shadow.touched(name):
                programs = shadow.array(name)[index]
                foreign = programs[(programs != 0) & (programs != self.program)].tolist()
                # Which of many programs came last is not known: any order that was made is taken to hold for them.
                unordered = [p for p in foreign if not self.seen or (p != MANY and p not in self.seen)]
                self._refuse(unordered, what=what, other=name)
        if what == "store":
            shadow.array("stores")[index] = self.epoch
            self.stored_blocks.add((block.shape, block.tobytes()))
        else:
            notes = shadow.array("loads" if what == "load" else "atomics")
            before = notes[index]
            notes[index] = np.where((before == 0) | (before == self.program), self.program, MANY)

    def _compare_stores(self, index: np.ndarray, shadow: Shadow, *, what: str, block: np.ndarray) -> None:
        if not shadow.touched("stores"):
            return
        epochs = shadow.array("stores")[index]
        programs = self.owners[epochs]
        foreign = (epochs != 0) & (programs != self.program)
        pairs = zip(programs[foreign].tolist(), epochs[foreign].tolist(), strict=True)
        self._refuse([p for p, epoch in pairs if self.seen.get(p, 0) < epoch], what=what, other="stores")
        # The same block of pointers is in the hands of the same lanes.
        if what == "load" and (epochs == self.epoch).any() and (block.shape, block.tobytes()) not in self.stored_blocks:
            raise self._fault("a load of what other lanes stored, without tl.debug_barrier() between them")

    def _refuse(self, unordered: list[int], *, what: str, other: str) -> None:
        if unordered:
            who = "several programs" if unordered[0] == MANY else f"program number {unordered[0] - 1}"
            raise self._fault(f"race: a {what} here and {other} of {who} touch one element")

    def _fault(self, text: str) -> MemoryFault:
        return MemoryFault(f"{text} ({self.kernel} at {self.position} of the grid)")
