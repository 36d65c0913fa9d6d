"""Lightning's view of a run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from elman.tracking.buffer import MetricBuffer


class RunLogger(Logger):
    """Sends metrics to the buffer; the run's status is none of its business."""

    def __init__(self, metrics: MetricBuffer, name: str, run_id: str) -> None:
        super().__init__()
        self._metrics, self._name, self._run_id = metrics, name, run_id

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
        self._metrics.add(metrics, step or 0)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run holds every setting before training begins."""
