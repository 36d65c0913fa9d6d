"""Delivers an outbox to the tracking store: in order, again after every failure, and nothing twice.

An answer may be lost after the store did what it was asked. So everything is asked in a
way that may be repeated: a run is looked for by its mark before it is made, and so is a
model; MLflow drops a metric that it has with the same step, time and value, and a tag or
an artifact is replaced by itself.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from elman.errors import TrackingError
from elman.tracking.absence import StoreAwayError, in_short
from elman.tracking.outbox import REFUSED, Outbox, Record, Row

if TYPE_CHECKING:
    from elman.tracking.store import RunStore

log = logging.getLogger(__name__)

MARK = "outbox.id"
"""Tag by which a run is found again whose creation was not confirmed."""

SEND_SECONDS = 5.0
"""Metrics are collected for so long, at first for less: one at a time costs 3.5 ms on sqlite and 26 ms through a
server, a thousand in a batch 0.1 ms each, and the training waits meanwhile where it has every core."""

SOON_SECONDS = 1.0
"""Until the first are sent: one looks whether the run goes well."""

LONGEST_PAUSE = 15.0
"""Between two attempts to reach a store that is away."""

LARGEST_BATCH = 1000
"""MLflow's own limit on the metrics of one request; params and tags have another."""

FEW = 100

ATTEMPTS = 3
"""At a record that fails for no reason of the store's being away."""

STALL_SECONDS = 5.0
"""Without success, after which a command that is done waits no longer for a store that is away."""

SLOW_SECONDS = {True: 120.0, False: 5.0}
"""The same, for a request that has not come back; True where the store is a file on this machine, or there is time."""

TOO_SLOW_SECONDS = 3.0
"""For one answer, where many are wanted."""

LEAVE_SECONDS = 0.5
"""For which an answer is waited for that comes too late."""

REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
     "NOT_IMPLEMENTED"}
)  # fmt: skip
"""What MLflow says where asking again is no use."""


def is_refusal(error: Exception) -> bool:
    """Whether the store understood, and will never do it."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in REFUSALS


class Sender:
    """Delivers what is in an outbox.

    Args:
        outbox: The run's.
        store: Where to; it may be away.
        creation: Makes the run, where an attempt to make it is still under way.
        reason: Why the store is known to be away.
    """

    def __init__(
        self,
        outbox: Outbox,
        store: RunStore,
        creation: Callable[[], str | None] | None = None,
        reason: str | None = None,
    ) -> None:
        self._outbox, self._store, self._creation = outbox, store, creation
        self._wake, self._closing = threading.Event(), threading.Event()
        self._busy = threading.Lock()
        self._failures: dict[tuple[str, int], int] = {}
        self._begun: float | None = None
        self._pace = 0.0
        self.succeeded = time.monotonic()
        self.reason = reason
        """Why the last attempt failed; None where it did not."""
        self.verdict: str | None = None
        """Why ``drain`` gave up; None where it did not."""
        self._thread: threading.Thread | None = None

    # The thread ------------------------------------------------------------------------------

    def start(self) -> None:
        """Deliver from now on, in a thread of its own."""
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        pause = min(SOON_SECONDS, SEND_SECONDS)
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            if self._closing.is_set():
                return
            was_away = self.reason is not None
            try:
                self.attempt()
            except sqlite3.ProgrammingError:
                return  # the answer came after the outbox was closed
            if self.reason is None:
                pause = min(SEND_SECONDS, 2 * pause)
                if was_away:
                    log.warning("The tracking store takes what is logged again.")
            else:
                if not was_away:
                    log.warning(
                        "warning: the tracking store does not take what is logged (%s): it waits in %s.",
                        self.reason, self._outbox.folder,
                    )  # fmt: skip
                pause = min(LONGEST_PAUSE, 2 * pause)

    def drain(self, patience: float = STALL_SECONDS, *, hurried: bool = True) -> int:
        """Deliver what waits, as long as the store takes it; returns what waits still.

        Args:
            patience: Seconds without success after which to give up where the store is away.
            hurried: Whether to give up, too, where it answers, but slowly.
        """
        begun = again = time.monotonic()
        while waiting := self._outbox.waiting():
            if self.reason is None or time.monotonic() > again:
                again = time.monotonic() + 1.0
                self._wake.set()
            time.sleep(0.01)
            idle = time.monotonic() - max(begun, self.succeeded)
            in_hand = self._begun
            if self.reason is not None and idle > patience:
                self.verdict = self.reason
                break
            slow = max(patience, SLOW_SECONDS[self._store.is_file or not hurried])
            if hurried and self._pace > TOO_SLOW_SECONDS and time.monotonic() - begun > slow:
                self.verdict = f"it takes {self._pace:.1f} s to answer"
                break
            if in_hand is not None and min(time.monotonic() - in_hand, idle) > slow:
                self.verdict = self.reason or f"no answer within {slow:g} s"
                break
        return waiting

    def stop(self) -> None:
        """End the thread; one that waits for an answer is left behind."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    # Delivery --------------------------------------------------------------------------------

    def attempt(self) -> None:
        """Deliver everything that waits, until the store fails."""
        with self._busy:
            try:
                run_id = self._outbox.fact("run") or self._step(self._run_id)
                while not self._closing.is_set() and (self._some_rows(run_id) or self._some_records(run_id)):
                    pass
                self.reason = None
            except sqlite3.ProgrammingError:
                raise
            except Exception as error:  # whatever a store's absence looks like, the training goes on
                self.reason = error.reason if isinstance(error, StoreAwayError) else in_short(error)
            finally:
                self._begun = None

    def _step(self, request: Callable[[], Any]) -> Any:
        begun = self._begun = time.monotonic()
        answer = request()
        self.succeeded = time.monotonic()
        self._pace = self.succeeded - begun
        self.reason = None
        return answer

    def _some_rows(self, run_id: str) -> bool:
        from mlflow.entities import Metric

        self._outbox.flush()
        rows = self._outbox.rows(LARGEST_BATCH)
        if not rows:
            return False

        def send() -> None:
            points = [Metric(row.key, row.value, row.timestamp, row.step) for row in rows]
            self._store.client.log_batch(run_id, metrics=points)

        self._deliver("metrics", rows, send)
        return True

    def _some_records(self, run_id: str) -> bool:
        records = self._outbox.records(FEW)
        if not records:
            return False
        kind = records[0].kind
        # Neighbours of these kinds go in one request.
        alike = len(records) if kind in ("tag", "param") else 1
        group = records[: next((i for i in range(alike) if records[i].kind != kind), alike)]
        self._deliver("records", group, lambda: getattr(self, f"_send_{kind}")(run_id, group))
        return True

    def _deliver(self, table: str, items: Sequence[Row | Record], send: Callable[[], Any]) -> None:
        numbers = [item.number for item in items]
        try:
            answer = self._step(send)
        except Exception as error:
            what = f"{items[0].kind} {items[0].name}" if isinstance(items[0], Record) else f"{len(items)} metrics"
            if not self._gives_up(table, numbers[0], error):
                raise
            log.warning("warning: the tracking store refuses %s (%s).", what, in_short(error))
            self._outbox.mark(table, numbers, REFUSED)
        else:
            self._outbox.mark(table, numbers, result=answer)

    def _gives_up(self, table: str, number: int, error: Exception) -> bool:
        if is_refusal(error) or (isinstance(error, TrackingError) and not isinstance(error, StoreAwayError)):
            return True
        if not isinstance(error, (TypeError, KeyError, AttributeError, FileNotFoundError)):
            return False
        count = self._failures[table, number] = self._failures.get((table, number), 0) + 1
        return count >= ATTEMPTS

    # What is delivered -----------------------------------------------------------------------

    def _run_id(self) -> str:
        """The run's id in the store, where it is made if it is not there."""
        made = None
        if self._creation is not None:
            made, self._creation = self._creation(), None
        if made is None:
            facts = self._outbox.fact("born")
            wanted = f"tags.`{MARK}` = '{facts['mark']}'"
            found = self._store.client.search_runs([self._store.experiment_id()], wanted, max_results=1)
            made = found[0].info.run_id if found else self._store.create_run(**facts)
        self._outbox.set_fact("run", made)
        return str(made)

    def _send_status(self, run_id: str, records: Sequence[Record]) -> None:
        self._store.client.update_run(run_id, status=records[0].content)

    def _send_end(self, run_id: str, records: Sequence[Record]) -> None:
        content = records[0].content
        self._store.client.set_terminated(run_id, status=content["status"], end_time=content["at"])

    def _send_param(self, run_id: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Param

        self._store.client.log_batch(run_id, params=[Param(r.name, r.content) for r in records])

    def _send_tag(self, run_id: str, records: Sequence[Record]) -> None:
        from mlflow.entities import RunTag

        self._store.client.log_batch(run_id, tags=[RunTag(r.name, r.content) for r in records])

    def _send_untag(self, run_id: str, records: Sequence[Record]) -> None:
        if records[0].name in self._store.client.get_run(run_id).data.tags:
            self._store.client.delete_tag(run_id, records[0].name)

    def _send_file(self, run_id: str, records: Sequence[Record]) -> None:
        record = records[0]
        place = PurePosixPath(record.name)
        folder = None if place.parent == PurePosixPath() else str(place.parent)
        if record.data is None:
            self._store.client.log_artifact(run_id, str(self._outbox.place(record.content)), folder)
            return
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / place.name
            path.write_bytes(record.data)
            self._store.client.log_artifact(run_id, str(path), folder)

    def _send_dataset(self, run_id: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(Dataset(**one["dataset"]), tags=[InputTag("mlflow.data.context", one["split"])])
            for one in records[0].content
        ]
        self._store.client.log_inputs(run_id, inputs)

    def _send_model(self, run_id: str, records: Sequence[Record]) -> str:
        from elman.tracking.models import send_pyfunc

        content = dict(records[0].content)
        return send_pyfunc(self._store, run_id, self._outbox.place(content.pop("files")), **content)

    def _send_register(self, run_id: str, records: Sequence[Record]) -> list[Any]:
        from elman.tracking.registry import register

        record, answers = records[0], self._outbox.answers()
        return list(register(self._store, run_id, answers["model"], record.name, **record.content))


def as_dataset(*, name: str, digest: str, source: str, split: str, profile: dict[str, object]) -> dict[str, Any]:
    """A split of a corpus as MLflow's input, in plain values."""
    dataset = {
        # MLflow keeps 36 characters of a digest; the whole one is a tag of the run.
        "name": f"{name}/{split}",
        "digest": digest[:16],
        "source_type": "text",
        "source": json.dumps({"source": source}),
        "schema": json.dumps({"mlflow_colspec": [{"type": "string", "name": "text", "required": True}]}),
        "profile": json.dumps(profile),
    }
    return {"dataset": dataset, "split": split}
