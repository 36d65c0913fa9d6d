"""Dropout by the compiled kernel of dropout.cpp: no mask is kept, and all threads draw.

torch draws on one thread, which takes longer than a recurrent layer in bfloat16.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.models.compiled import load_library
from elman.models.memory import pooled

SOURCE = Path(__file__).with_name("dropout.cpp")
FEWEST = 2**14
"""Elements from which on the kernel is used: below, torch is as fast."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability ``p``, and scale the others by 1 / (1 − p).

    Draws one number from torch's generator: it seeds the mask.
    """
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if not known or x.numel() < FEWEST or not 0 < p < 1 or _kernels() is None:
        return F.dropout(x, p)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    dropped: Tensor = _Dropped.apply(x, p, seed)  # type: ignore[no-untyped-call]
    return dropped


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        # The recurrent kernel's outputs are views of time-major memory; a mask goes by memory.
        ctx.turned = x.ndim == 3 and not x.is_contiguous()
        ctx.p, ctx.seed = p, seed
        return _drop(x, p, seed, ctx.turned)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_dropped: Tensor) -> tuple[Tensor, None, None]:
        return _drop(d_dropped, ctx.p, ctx.seed, ctx.turned), None, None


def _drop(x: Tensor, p: float, seed: int, turned: bool) -> Tensor:
    x = (x.transpose(0, 1) if turned else x).contiguous()
    dropped = pooled(x.shape, x.dtype)
    kernels = _kernels()
    assert kernels is not None
    kernels[x.dtype](
        x.data_ptr(), dropped.data_ptr(), x.numel(), seed, round(p * 2**32), 1 / (1 - p), torch.get_num_threads()
    )
    return dropped.transpose(0, 1) if turned else dropped


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]] | None:
    library = load_library(SOURCE)
    return None if library is None else _by_type(library)


def _by_type(library: ctypes.CDLL) -> dict[torch.dtype, Callable[..., None]]:
    kernels: dict[torch.dtype, Callable[..., None]] = {
        torch.float32: library.elman_drop_float,
        torch.bfloat16: library.elman_drop_bfloat16,
    }
    for kernel in kernels.values():
        kernel.argtypes = (  # type: ignore[attr-defined]  # of ctypes
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float),
            ctypes.c_int,
        )
    return kernels
