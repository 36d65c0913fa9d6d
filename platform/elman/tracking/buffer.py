"""Metrics on their way to MLflow: collected in memory, sent in batches by a thread.

One value at a time costs 3.5 ms on sqlite and 26 ms through a server; a thousand in a
batch cost 0.1 ms each. The training never waits for either.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
LARGEST_BATCH = 1000
"""MLflow's own limit on the metrics of one request."""


class Row(NamedTuple):
    """A metric's value at a step; ``timestamp`` is in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


class MetricBuffer:
    """Collects metrics and delivers them in order, in batches, from a thread of its own.

    A delivery that fails is tried again with the next; what could not be delivered by the
    end is counted and said. What a resumed run has already is not delivered twice.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._waiting: list[Metric] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._recorded: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._deliver, name="metrics", daemon=True)
        self._thread.start()

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Note values at a step; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = [
            Metric(key, _storable(value), now, step)
            for key, value in metrics.items()
            if (key, step) not in self._recorded
        ]
        with self._lock:
            self._waiting.extend(fresh)

    def go_on(self, recorded: Iterable[tuple[str, int]], unsent: Iterable[Row]) -> None:
        """Go on where another process was ended.

        Args:
            recorded: (key, step) that the store has: they are dropped when they come again.
            unsent: What waited in that process; delivered unless the store has it.
        """
        from mlflow.entities import Metric

        known = set(recorded)
        again = [row for row in unsent if (row.key, row.step) not in known]
        self._recorded = known | {(row.key, row.step) for row in again}
        with self._lock:
            self._waiting.extend(Metric(*row) for row in again)

    def unsent(self) -> list[Row]:
        """What the store has not confirmed."""
        with self._lock:
            return [Row(m.key, m.value, m.timestamp, m.step) for m in self._waiting]

    def flush(self) -> None:
        """Deliver what waits, now; on failure it goes on waiting."""
        with self._sending:
            while True:
                with self._lock:
                    batch = self._waiting[:LARGEST_BATCH]
                if not batch:
                    return
                try:
                    self._client.log_batch(self._run_id, metrics=batch)
                except Exception as error:  # whatever a server's absence looks like, the training goes on
                    if self._error is None:
                        log.warning("Metrics wait: the tracking store does not take them (%s).", _first_line(error))
                    self._error = error
                    return
                self._error = None
                with self._lock:
                    del self._waiting[: len(batch)]

    def close(self) -> None:
        """Deliver the rest and end the thread."""
        self._closing.set()
        self._thread.join()
        self.flush()
        if self._waiting:
            log.warning("%d metrics were lost: the tracking store never took them.", len(self._waiting))

    def _deliver(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self.flush()


def _storable(value: float) -> float:
    value = float(value)
    # MLflow's databases hold no infinity of their own.
    return value if math.isfinite(value) or math.isnan(value) else math.copysign(1.7976931348623157e308, value)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
