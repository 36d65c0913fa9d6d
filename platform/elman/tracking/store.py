"""The MLflow store: where it is, and a run's life in it.

The status of a run is ours to set: FINISHED, FAILED with the error's first line, or
KILLED where the user stopped it. What a run logs goes through its outbox.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from elman.config.load import dump_yaml
from elman.config.schema import ExperimentConfig, TrackingConfig
from elman.config.tree import flatten, signature
from elman.errors import TrackingError
from elman.tracking.outbox import Outbox
from elman.tracking.run import Run as Run
from elman.tracking.sender import MARK, STALL_SECONDS, Sender

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A server that is away is noticed in seconds, not in MLflow's four minutes; nobody is told of our runs.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("PGCONNECT_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is ours
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

LOCAL_ROOT = "mlruns"

START_SECONDS = 4.0
"""For which a training waits for a server's first answer; without one it begins, and what it logs waits."""

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The user stopped the training; the run is KILLED.

    Args:
        signal_number: What stopped it: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.run_id: str | None = None


def warm() -> None:
    """Import what takes a second, before there is anything to record."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def without_password(uri: str) -> str:
    """A URI fit to be shown: what stands before the host's @ is cut."""
    return re.sub(r"(://)[^/@\s]*@", r"\1***@", uri)


def local_root() -> Path:
    """The folder of the local store, absolute: MLflow stores locations as they are given."""
    return Path(LOCAL_ROOT).absolute()


def outbox_root() -> Path:
    """Where the outboxes of runs are."""
    return local_root() / "outbox"


def checkpoint_root() -> Path:
    """Where the checkpoints of runs are while they train."""
    return local_root() / "checkpoints"


def tracking_uri(config: TrackingConfig) -> str:
    """The URI in force: the setting, else MLFLOW_TRACKING_URI, else sqlite under ./mlruns."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or local_uri()


def local_uri() -> str:
    """The local store's."""
    return f"sqlite:///{local_root() / 'mlflow.db'}"


class PatientClient:
    """An MlflowClient whose calls wait for a store that is away for a while.

    Args:
        client: The real one.
        seconds: After which its absence is an error.
    """

    def __init__(self, client: MlflowClient, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def call(*arguments: Any, **named: Any) -> Any:
            deadline = time.monotonic() + self._seconds
            while True:
                try:
                    return method(*arguments, **named)
                except Exception as error:  # of MLflow, its databases' drivers, or the network
                    if not _is_absence(error) or time.monotonic() > deadline:
                        raise
                    log.info("The tracking store does not answer; waiting (%s).", first_line(error))
                    time.sleep(1.0)

        return call


class StoreAwayError(TrackingError):
    """Nobody answers where the tracking store should be.

    Attributes:
        reason: In a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _is_absence(error: Exception) -> bool:
    """Whether nobody answered, rather than that the answer was no."""
    from mlflow.exceptions import MlflowException

    text = str(error)
    if "authentication failed" in text:
        return False
    if isinstance(error, MlflowException):
        if error.error_code in ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"):
            return True
        return error.error_code == "INTERNAL_ERROR" and any(
            sign in text for sign in ("OperationalError", "API request to", "Connection refused", "server closed")
        )
    kind = type(error)
    return (
        isinstance(error, ConnectionError | json.JSONDecodeError)
        or kind.__module__.split(".")[0] in ("requests", "urllib3")
        or kind.__name__ == "OperationalError"
    )


@dataclass(frozen=True)
class RunSummary:
    """A run as the store has it."""

    id: str
    name: str
    experiment: str
    status: str
    started: int
    """Milliseconds since 1970."""
    ended: int | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def local_id(self) -> str:
        """What its folders on this machine are called: its mark where the store was away when it began."""
        mark = self.tags.get(MARK, self.id)
        return mark if any((root / mark).exists() for root in (outbox_root(), checkpoint_root())) else self.id


class RunStore:
    """A tracking store, opened.

    Args:
        config: Where it is.
        patience: Seconds for which a call is tried again while nobody answers; the first one never waits.
        may_be_away: Whether it is all right that nobody answers now: runs can begin, and what they log waits.

    Raises:
        StoreAwayError: Nobody answers, and that is not all right.
        TrackingError: It cannot be used or written.
    """

    def __init__(
        self, config: TrackingConfig | None = None, *, patience: float = 0.0, may_be_away: bool = False
    ) -> None:
        self.config = config or TrackingConfig()
        self.uri = tracking_uri(self.config)
        self.is_local = self.uri == local_uri()
        self.is_file = self.uri.startswith("sqlite:")
        self.patience, self.may_be_away = patience, may_be_away and not self.is_file
        self.away: str | None = None
        """Why it was away when a run should have begun."""
        self._opened: MlflowClient | None = None
        self._connecting = threading.Lock()
        if not self.may_be_away:
            self._opened = self._connect()
            return
        try:
            within(START_SECONDS, lambda: self.client)
        except (StoreAwayError, TimeoutError) as error:
            self.away = error.reason if isinstance(error, StoreAwayError) else str(error)

    @property
    def client(self) -> MlflowClient:
        """MLflow's.

        Raises:
            StoreAwayError: Nobody answers.
        """
        with self._connecting:
            if self._opened is None:
                self._opened = self._connect()
            return self._opened

    def _connect(self) -> MlflowClient:
        # MLflow announces every database migration, and urllib3 every attempt to reach a server: what
        # comes of them is said once, by us.
        for name in ("alembic", "mlflow.store.db.utils", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            if self.uri.startswith("http"):
                client = self._client()
            else:
                root = local_root()
                root.mkdir(parents=True, exist_ok=True)
                # Two processes that create the tables at once crash each other.
                with (root / ".lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    client = self._client()
        except OSError as error:
            raise TrackingError(
                f"{local_root()} cannot be written ({error.strerror}): run where you may write, or set tracking.uri."
            ) from None
        return cast("MlflowClient", PatientClient(client, self.patience)) if self.patience else client

    def _client(self) -> MlflowClient:
        import mlflow
        import mlflow.store.db.utils
        from mlflow.exceptions import MlflowException

        # A database that is away is seen in a second, not in a hundred; whoever can wait asks again.
        mlflow.store.db.utils.MAX_RETRY_COUNT = 3
        try:
            client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.get_experiment_by_name(self.config.experiment)
        except Exception as error:
            absent = _is_absence(error)
            if isinstance(error, OSError) and not absent:
                raise
            if not absent and not isinstance(error, MlflowException) and type(error).__module__.split(".")[0] not in (
                "sqlalchemy", "requests", "urllib3",
            ):  # fmt: skip
                raise
            message = (
                f"The tracking store {without_password(self.uri)} cannot be used ({in_short(error)}): "
                "start its server, or set tracking.uri or MLFLOW_TRACKING_URI to another."
            )
            raise (StoreAwayError(message, in_short(error)) if absent else TrackingError(message)) from None
        return client

    @contextmanager
    def as_mlflows_own(self) -> Iterator[None]:
        """Make this the store of mlflow's own functions for a while, and undo what that leaves behind.

        Some things cannot be done through a client; but mlflow writes the URI into the
        environment, where the next store would take it for the user's wish.
        """
        import mlflow

        names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        before = {name: os.environ.get(name) for name in names}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before["MLFLOW_TRACKING_URI"])  # type: ignore[arg-type]  # None unsets it
            mlflow.set_registry_uri(before["MLFLOW_REGISTRY_URI"])  # type: ignore[arg-type]  # None unsets it
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def experiment_id(self) -> str:
        """The id of the configured experiment, created where it does not exist."""
        from mlflow.exceptions import MlflowException

        name = self.config.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise TrackingError(f"tracking.experiment {name} was deleted: restore it, or use another name.")
            return str(found.experiment_id)
        # A server knows its own place for artifacts; a database has none.
        location = None if self.uri.startswith("http") else str(local_root() / "artifacts" / name)
        try:
            # Without its kind the UI takes every experiment for a chatbot's.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            # Another process was faster.
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def create_run(self, *, mark: str, name: str, tags: Mapping[str, str], started: int) -> str:
        """Make a run; returns its id.

        Args:
            mark: By which it is found again where the answer is lost.
            name: What the UI calls it.
            tags: Recorded with it.
            started: Milliseconds since 1970.
        """
        created = self.client.create_run(
            self.experiment_id(), start_time=started, run_name=name, tags={**tags, MARK: mark}
        )
        return str(created.info.run_id)

    def start_run(
        self, config: ExperimentConfig, name: str, tags: Mapping[str, str], parent: str | None = None
    ) -> AbstractContextManager[Run]:
        """Open a run for a configuration; its end decides the status.

        Args:
            config: Recorded whole, as params and as config.yaml.
            name: What the UI calls it.
            tags: Recorded with it.
            parent: Id of the run that it belongs to.
        """
        params = {key: _as_text(value) for key, value in flatten(config).items()}
        described = {**tags, "config.signature": signature(config)}
        return self.open_run(name, params, described, parent=parent, files={"config.yaml": dump_yaml(config)})

    @contextmanager
    def open_run(
        self,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        *,
        parent: str | None = None,
        files: Mapping[str, str] | None = None,
        resume: RunSummary | str | None = None,
    ) -> Iterator[Run]:
        """Open a run, or open one again; its end decides the status.

        Args:
            name: What the UI calls it.
            params: Recorded with it, once.
            tags: Recorded with it.
            parent: Id of the run that it belongs to.
            files: Text artifacts that it begins with.
            resume: A run to go on with; its params and files stand.

        Raises:
            StoreAwayError: The store is away, and may not be.
            TrackingError: The experiment was deleted, or the outbox cannot be opened.
        """
        if resume is not None:
            run = self._open_again(name, resume)
        else:
            run = self._begin(name, tags, parent)
            run.set_params({key: without_password(value) for key, value in params.items()})
            for file, text in (files or {}).items():
                run.log_text(file, without_password(text))
        run.sender.start()
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except StoppedError as stop:
            status, stop.run_id = "KILLED", run.id
            raise
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            run.set_tags({"error": first_line(error)})
            raise
        finally:
            run.metrics.put("end", "end", {"status": status, "at": int(time.time() * 1000)})
            self._end(run)

    def _begin(self, name: str, tags: Mapping[str, str], parent: str | None) -> Run:
        described = {**tags, "mlflow.source.name": "elman", "mlflow.source.type": "LOCAL",
                     "mlflow.user": getpass.getuser()}  # fmt: skip
        if parent is not None:
            described["mlflow.parentRunId"] = parent
        born = {"mark": uuid.uuid4().hex, "name": name, "tags": described, "started": int(time.time() * 1000)}
        run_id: str | None = None
        creation: Callable[[], str | None] | None = None
        if not self.may_be_away:
            run_id = self.create_run(**born)  # type: ignore[arg-type]  # as written above
        elif self.away is None:
            call = Call(lambda: self.create_run(**born))  # type: ignore[arg-type]  # as written above
            try:
                run_id = call.result(START_SECONDS)
            except TimeoutError as error:
                self.away, creation = str(error), call.late
            except Exception as error:
                if not _is_absence(error) and not isinstance(error, StoreAwayError):
                    raise
                self.away = error.reason if isinstance(error, StoreAwayError) else in_short(error)
        outbox = self._outbox(run_id or str(born["mark"]))
        outbox.set_fact("born", born)
        if run_id is not None:
            outbox.set_fact("run", run_id)
        return Run(self, run_id or str(born["mark"]), name, outbox, Sender(outbox, self, creation, self.away))

    def _open_again(self, name: str, resume: RunSummary | str) -> Run:
        run_id = resume if isinstance(resume, str) else resume.id
        local = run_id if isinstance(resume, str) else resume.local_id
        outbox = self._outbox(local)
        if outbox.is_empty and isinstance(resume, RunSummary):
            for key in resume.metrics:
                outbox.seed(key, self.history(run_id, key))
        outbox.forget("end")
        outbox.set_fact("run", run_id)
        outbox.put("status", "status", "RUNNING")
        outbox.put("untag", "error")
        return Run(self, run_id, name, outbox, Sender(outbox, self))

    def _outbox(self, name: str) -> Outbox:
        """A run's outbox, which knows where it is to be delivered."""
        outbox = Outbox(outbox_root() / name, patience=STALL_SECONDS)
        outbox.set_fact("store", {"uri": without_password(self.uri), "is_local": self.is_local,
                                  "experiment": self.config.experiment})  # fmt: skip
        return outbox

    def _end(self, run: Run) -> None:
        waiting = run.sender.drain(max(self.patience, STALL_SECONDS))
        run.sender.stop()
        refused = run.metrics.refused()
        run.id = str(run.metrics.fact("run") or run.id)
        run.answers = run.metrics.answers()
        lost = run.metrics.close(ended=True)
        if lost:
            log.warning("warning: %d records of run %s are lost: neither disk nor store took them.", lost, run.id)
        elif waiting:
            log.warning(
                "warning: %d records of run %s wait in %s, because the tracking store does not take them (%s). "
                "`elman sync` delivers them.", waiting, run.id, run.metrics.folder, run.sender.verdict,
            )  # fmt: skip
        if refused:
            log.warning("warning: the tracking store refused %d records of run %s.", refused, run.id)

    def children(self, parent: str, *, running: bool = False) -> list[RunSummary]:
        """The runs that belong to a run, the oldest first.

        Args:
            parent: Its id.
            running: Only those that are, or that nobody has ended.
        """
        wanted = f"tags.`mlflow.parentRunId` = '{parent}'" + (" and attributes.status = 'RUNNING'" if running else "")
        return self.runs(filter_string=wanted, order_by=["attributes.start_time ASC"], limit=50_000)

    def abandon(self, run_id: str, reason: str) -> None:
        """End a run whose process is gone."""
        self.client.set_tag(run_id, "error", without_password(reason)[:500])
        self.client.set_terminated(run_id, status="FAILED")

    def exists(self, run_id: str) -> bool:
        """Whether this store has the run."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException:
            return False

    def delete_artifact(self, run_id: str, path: str) -> None:
        """Remove an artifact; one that is not there is no matter."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(self.client.get_run(run_id).info.artifact_uri)
        repository.delete_artifacts(path)  # type: ignore[no-untyped-call]  # mlflow's

    def find_run(self, run_id: str) -> RunSummary:
        """A run by its id, or by the first eight or more digits of it.

        Raises:
            TrackingError: There is none, or several begin so.
        """
        if re.fullmatch(r"[0-9a-f]{32}", run_id):
            from mlflow.exceptions import MlflowException

            try:
                return self._summary(self.client.get_run(run_id), {})
            except MlflowException:
                marked = self.runs(filter_string=f"tags.`{MARK}` = '{run_id}'", every_experiment=True)
            if marked:
                return marked[0]
            raise TrackingError(f"There is no run {run_id} in {without_password(self.uri)}.")
        matches = [
            run for run in self.runs(every_experiment=True)
            if run.id.startswith(run_id) or run.name == run_id or (len(run_id) > 7 and _mark(run).startswith(run_id))
        ]  # fmt: skip
        if len(matches) == 1 or (matches and all(run.name == run_id for run in matches)):
            return matches[0]  # the newest of a name
        if matches:
            raise TrackingError(f"{run_id} names {len(matches)} runs: give more of the id.")
        raise TrackingError(f"There is no run {run_id!r} in {without_password(self.uri)}: `elman runs` lists them.")

    def runs(
        self,
        *,
        filter_string: str = "",
        order_by: Sequence[str] = (),
        limit: int = 1000,
        every_experiment: bool = False,
    ) -> list[RunSummary]:
        """Runs of the experiment, the newest first unless ordered otherwise.

        Raises:
            TrackingError: MLflow does not understand the filter or the order.
        """
        from mlflow.exceptions import MlflowException

        experiments = {str(e.experiment_id): e.name for e in self.client.search_experiments()}
        wanted = [i for i, name in experiments.items() if every_experiment or name == self.config.experiment]
        if not wanted:
            return []
        try:
            found = self.client.search_runs(wanted, filter_string, max_results=limit, order_by=list(order_by) or None)
        except MlflowException as error:
            raise TrackingError(f"MLflow refuses that: {str(error).splitlines()[0]}") from None
        return [self._summary(run, experiments) for run in found]

    @staticmethod
    def _summary(run: Any, experiments: Mapping[str, str]) -> RunSummary:
        return RunSummary(
            id=run.info.run_id,
            name=run.info.run_name or "",
            experiment=experiments.get(str(run.info.experiment_id), str(run.info.experiment_id)),
            status=run.info.status,
            started=run.info.start_time,
            ended=run.info.end_time,
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            tags=dict(run.data.tags),
        )

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        points = self.client.get_metric_history(run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def download(self, run_id: str, artifact: str, into: Path) -> Path:
        """An artifact's local copy.

        Raises:
            TrackingError: The run has no such artifact.
        """
        import mlflow

        try:
            return Path(
                mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=artifact, dst_path=str(into), tracking_uri=self.uri
                )
            )
        except Exception as error:
            raise TrackingError(
                f"Run {run_id} has no artifact {artifact} ({str(error).splitlines()[0][:120]})."
            ) from None


class Call:
    """A function that runs in a thread of its own, so that nobody need wait for it.

    Args:
        function: What to call.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._answer: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._function()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float | None) -> Any:
        """Its answer.

        Raises:
            TimeoutError: It has not come back within so many seconds.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"no answer within {seconds:g} s")
        if self._error is not None:
            raise self._error
        return self._answer

    def late(self) -> Any:
        """Its answer, whenever it comes; None where it failed."""
        with suppress(Exception):
            return self.result(None)
        return None


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns.

    Raises:
        TimeoutError: It takes longer; it goes on by itself.
    """
    return Call(function).result(seconds)


def _mark(run: RunSummary) -> str:
    return run.tags.get(MARK, "")


def first_line(error: BaseException) -> str:
    """What an error says, fit to be shown in a line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_password(line)[:500]


def in_short(error: BaseException) -> str:
    """Why a store did not do what it was asked, in a few words where they are known."""
    text = str(error)
    for sign, words in _IN_SHORT.items():
        if sign in text:
            return words
    return first_line(error)[:200]


_IN_SHORT = {
    "Connection refused": "connection refused",
    "timed out": "no answer in time",
    "Remote end closed": "it closes the connection",
    "Connection aborted": "it closes the connection",
    "Connection reset": "it closes the connection",
    "too many 5": "it answers with errors",
    "failed with error code 5": "it answers with errors",
    "Name or service not known": "there is no such host",
    "database is locked": "another process writes",
}


def _as_text(value: object) -> str:
    """A setting's value as MLflow shows it: text bare, everything else as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value)
