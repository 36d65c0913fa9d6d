"""The device, the arithmetic it is fast in, and the threads to use."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from elman.errors import ConfigError

Precision = Literal["fp32", "bf16"]


def cores() -> int:
    """Cores that this process may use: in a container, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def set_threads(threads: int | None) -> None:
    """Let torch use that many threads; None, one per core. More of them than cores is ten times slower."""
    torch.set_num_threads(threads or cores())


def resolve_device(setting: str) -> torch.device:
    """The device that ``trainer.device`` means here.

    Raises:
        ConfigError: cuda is asked for, and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device is cuda, and torch sees no GPU here: choose auto or cpu.")
    if setting == "cuda" or (setting == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself: AVX512-BF16, AMX, or a GPU of Ampere's generation on.

    Without it bfloat16 is emulated, and slower than single precision.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public question for this.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """The arithmetic that ``trainer.precision`` means on ``device``."""
    if setting == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return "bf16" if setting == "bf16" else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16, everything delicate in float32; weights stay float32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
