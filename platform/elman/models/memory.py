"""Large memory that is used again and again, by the compiled kernels."""

from __future__ import annotations

import mmap
import threading
import weakref

import torch
from torch import Tensor

LARGE = 2**20
_free: list[mmap.mmap] = []
_picking = threading.Lock()


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
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)
