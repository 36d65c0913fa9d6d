from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch

from elman.tracking import environment as module
from elman.tracking.environment import SystemMetrics, code_state, environment


def test_the_environment_names_versions_and_hardware() -> None:
    facts = environment()
    assert facts["packages"]["torch"] == torch.__version__  # type: ignore[index]
    assert facts["cpu"]
    assert facts["threads"] == torch.get_num_threads()


def test_the_code_state_is_a_commit_and_a_diff_or_nothing() -> None:
    commit, diff = code_state()
    assert (commit is None and diff == "") or (commit is not None and len(commit) == 40)


def test_the_machine_is_sampled_while_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.01)

    class Buffer:
        def __init__(self) -> None:
            self.rows: list[tuple[int, Mapping[str, float]]] = []

        def add(self, metrics: Mapping[str, float], step: int) -> None:
            self.rows.append((step, metrics))

    buffer = Buffer()
    with SystemMetrics(buffer, first=0.01):  # type: ignore[arg-type]
        time.sleep(0.3)
    assert len(buffer.rows) > 1
    assert [step for step, _ in buffer.rows] == list(range(len(buffer.rows)))
    assert all(row["system/process_memory_megabytes"] > 10 for _, row in buffer.rows)
