"""Large memory that is used again and again, from step to step."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref

import torch
from torch import Tensor

LARGE = 2**20
KEPT_BYTES = 2**27
"""Freed memory that the C library keeps for the next step."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 2**25
"""Of mallopt(3): glibc's numbers for the two, and the most that it takes for the latter."""
_free: list[mmap.mmap] = []
_picking = threading.Lock()


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees, up to ``KEPT_BYTES``; where it is not glibc, do nothing.

    Every step takes and frees the same buffers of some megabytes. By itself glibc gives them back to the system,
    and their new pages made a step of small models over some hundred symbols 1.2 to 1.5 times as long.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def pooled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose pages, where it is large, come back with the next one.

    Memory of tens of megabytes goes back to the system when a tensor is freed, and at these
    speeds new pages for every window cost a tenth of it.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    with _picking:
        block = min((block for block in _free if len(block) >= size), key=len, default=None)
        if block is None:
            _free.clear()  # all too small: windows have grown, and would leave them behind
        else:
            _free.remove(block)
    if block is None:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
    lease = memoryview(block)
    weakref.finalize(lease, _free.append, block).atexit = False
    # Given its shape in place: a view would keep another tensor, and autograd adds to what nobody else has alone.
    return torch.frombuffer(lease, dtype=dtype, count=count).resize_(shape)
