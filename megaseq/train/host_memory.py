"""Memory of the process between the steps of training."""

from __future__ import annotations

import ctypes
import sys

# From malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for the next step instead of handing it back to the system.

    Every step allocates and frees the same activations. By default the GNU C library gives large blocks back at once,
    and the next step pays a page fault for every 4 KiB of them again: with 64 MiB blocks, writing for the first time
    took 13 times as long as writing (benchmarks/train_cpu.py shows the difference of whole steps). The price is that
    the process stays at its highest memory.

    Returns:
        Whether it took effect; other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = (
        (_MMAP_MAX, 0),  # Blocks from the heap, which is kept, and never from maps of their own, which are not.
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_TOP_PAD, _TOP_PAD_BYTES),
        (_ARENA_MAX, 1),  # Other arenas are too small for large blocks.
    )
    return all([library.mallopt(name, value) == 1 for name, value in settings])
