"""Lightning's view of a run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from elman.tracking.outbox import Outbox


class RunLogger(Logger):
    """Sends metrics to the outbox; the run's status is none of its business.

    Args:
        metrics: The run's.
        name: The run's.
        run_id: The run's.
        prefix: Goes before every metric's name, where several trainings share a run.
    """

    def __init__(self, metrics: Outbox, name: str, run_id: str, prefix: str = "") -> None:
        super().__init__()
        self._metrics, self._name, self._run_id, self._prefix = metrics, name, run_id, prefix

    @property
    def name(self) -> str:
        """The run's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Note values at a step."""
        self._metrics.add({self._prefix + name: value for name, value in metrics.items()}, step or 0)

    def settle(self) -> None:
        """Write down what was logged: a checkpoint counts on it."""
        self._metrics.flush()

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run holds every setting before training begins."""
