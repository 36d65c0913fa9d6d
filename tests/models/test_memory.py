"""Memory that a training step frees and takes again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_buffers_that_every_step_frees_come_back_with_their_pages() -> None:
    faults = int(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    assert faults < ROUNDS * 800  # a tenth of the pages of a round
