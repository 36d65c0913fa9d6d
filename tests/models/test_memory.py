"""Memory that a training step frees and takes again."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch

from elman.models.memory import pooled

ROUNDS = 5
PROGRAM = f"""
import resource, torch
from elman.models.memory import keep_freed_memory
keep_freed_memory()
def take():
    for buffer in [torch.empty(2**20) for _ in range(8)]:  # 32 MB in all
        buffer.fill_(1)
for _ in range(4):  # the heap grows to what a round takes
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_autograd_adds_in_place_to_a_gradient_in_pooled_memory() -> None:
    gradient = pooled((2**10, 2**8 + 3), torch.float32)
    assert gradient.shape == (2**10, 2**8 + 3)

    class Filled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, d_sum: torch.Tensor) -> torch.Tensor:
            nonlocal gradient
            given = gradient.fill_(1)
            del gradient
            return given

    weight, place = torch.zeros(gradient.shape, requires_grad=True), gradient.data_ptr()
    rows = torch.nn.functional.embedding(torch.tensor([1, 1]), weight)
    (Filled.apply(weight) + rows.sum()).backward()
    assert weight.grad.data_ptr() == place
    assert weight.grad[:3, 0].tolist() == [1, 3, 1]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_buffers_that_every_step_frees_come_back_with_their_pages() -> None:
    faults = int(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    assert faults < ROUNDS * 800  # a tenth of the pages of a round
