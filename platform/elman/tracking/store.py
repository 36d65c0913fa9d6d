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
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from elman.config.load import dump_yaml
from elman.config.schema import ExperimentConfig, TrackingConfig, check_store
from elman.config.tree import flatten, signature
from elman.errors import TrackingError, without_password
from elman.tracking.absence import (
    Call,
    PatientClient,
    StoreAwayError,
    first_line,
    in_short,
    is_absence,
    within,
)
from elman.tracking.local import RunSummary, local_root, local_uri, outbox_root, refuse_full_disk
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

START_SECONDS = 4.0
"""For which a training waits for a server's first answers; without them it begins, and what it logs waits."""

RECOGNISED = ("config.signature", "corpus.digest")
"""Tags that tell which training a run is."""

LEAST_SECONDS = 0.2
"""Left for the run to be made, however slowly the server was reached."""

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


def tracking_uri(config: TrackingConfig) -> str:
    """The URI in force: the setting, else MLFLOW_TRACKING_URI, else sqlite under ./mlruns."""
    own = os.environ.get("MLFLOW_TRACKING_URI")
    check_store("MLFLOW_TRACKING_URI", own)
    return config.uri or own or local_uri()


def refuse_unmade(config: TrackingConfig) -> None:
    """Whoever looks for a run must not make the database that it is not in.

    Raises:
        TrackingError: The store is a file that does not exist.
    """
    uri = tracking_uri(config)
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if path != uri and not os.path.exists(path):  # noqa: PTH110 - long paths make the other raise
        raise TrackingError(
            f"There are no runs in {path}, which does not exist: `elman train` makes the first one; run where yours "
            "are, or set tracking.uri."
        )


def open_to_read(config: TrackingConfig) -> RunStore:
    """The store, where there is one.

    Raises:
        TrackingError: There is none, or it cannot be used.
    """
    refuse_unmade(config)
    return RunStore(config)


class RunStore:
    """A tracking store, opened.

    Args:
        config: Where it is.
        patience: Seconds for which a call is tried again while nobody answers; the first one never waits.
        may_be_away: Whether it is all right that nobody answers now: runs can begin, and what they log waits.
        away: Why it is known to be away; it is not asked again before the first delivery.

    Raises:
        StoreAwayError: Nobody answers, and that is not all right.
        TrackingError: It cannot be used or written.
    """

    def __init__(
        self,
        config: TrackingConfig | None = None,
        *,
        patience: float = 0.0,
        may_be_away: bool = False,
        away: str | None = None,
    ) -> None:
        self.config = config or TrackingConfig()
        self.uri = tracking_uri(self.config)
        self.is_local = self.uri == local_uri()
        self.is_file = self.uri.startswith("sqlite:")
        self.patience, self.may_be_away = patience, may_be_away and not self.is_file
        if may_be_away:  # a run is to begin
            refuse_full_disk()
        self.away = away
        """Why it was away when a run should have begun."""
        self._left = START_SECONDS
        self._opened: MlflowClient | None = None
        self._connecting = threading.Lock()
        if not self.may_be_away:
            self._opened = self._connect()
            return
        if self.away is not None:
            return
        begun = time.monotonic()
        try:
            within(self._left, lambda: self.client)
        except (StoreAwayError, TimeoutError) as error:
            self.away = error.reason if isinstance(error, StoreAwayError) else str(error)
        self._left = max(LEAST_SECONDS, self._left - (time.monotonic() - begun))

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
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            if self.uri.startswith("http"):
                client = self._client()
            else:
                root = local_root()
                root.mkdir(parents=True, exist_ok=True)
                if not (root / "mlflow.db").exists():
                    refuse_full_disk()
                # Two processes that create the tables at once crash each other.
                with (root / ".lock").open("a") as lock:
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
            absent = is_absence(error)
            if isinstance(error, OSError) and not absent:
                raise
            if not absent and not isinstance(error, MlflowException) and type(error).__module__.split(".")[0] not in (
                "sqlalchemy", "requests", "urllib3",
            ) and not isinstance(error, ImportError):  # fmt: skip
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
        resume: RunSummary | None = None,
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
            run = self._begin(name, params, tags, parent, files or {})
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
            self._end(run, status)

    def _begin(
        self,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        parent: str | None,
        files: Mapping[str, str],
    ) -> Run:
        from mlflow.exceptions import MlflowException

        described = {**tags, "mlflow.source.name": "elman", "mlflow.source.type": "LOCAL",
                     "mlflow.user": getpass.getuser()}  # fmt: skip
        if parent is not None:
            described["mlflow.parentRunId"] = parent
        refuse_full_disk()
        born = {"mark": uuid.uuid4().hex, "name": name, "tags": described, "started": int(time.time() * 1000)}
        # First the outbox: a run that the store has, and whose process is killed, is recognised by it.
        outbox = self._outbox(str(born["mark"]))
        outbox.set_fact("born", born)
        for key, value in params.items():
            outbox.put("param", key, without_password(value))
        for file, text in files.items():
            outbox.put("file", file, None, without_password(text).encode("utf-8"))
        try:
            run_id, creation = self._ask_for_run(born)
        except BaseException as error:
            outbox.close(ended=False)
            shutil.rmtree(outbox.folder, ignore_errors=True)  # there is no run to deliver it to
            if not isinstance(error, MlflowException):
                raise
            raise TrackingError(
                f"The tracking store {without_password(self.uri)} does not take a run ({in_short(error)}): "
                "mend it, or set tracking.uri to another."
            ) from error
        if run_id is not None:
            outbox.set_fact("run", run_id)
        return Run(self, run_id or str(born["mark"]), name, outbox, Sender(outbox, self, creation, self.away))

    def _ask_for_run(self, born: Mapping[str, Any]) -> tuple[str | None, Callable[[], str | None] | None]:
        """The id of a new run, or None and, where the answer may still come, what waits for it."""
        if not self.may_be_away:
            return self.create_run(**born), None
        if self.away is not None:
            return None, None
        call = Call(lambda: self.create_run(**born))
        try:
            return str(call.result(self._left)), None
        except TimeoutError as error:
            self.away = str(error)
            return None, call.late
        except Exception as error:
            if not is_absence(error) and not isinstance(error, StoreAwayError):
                raise
            self.away = error.reason if isinstance(error, StoreAwayError) else in_short(error)
            return None, None

    def _open_again(self, name: str, resume: RunSummary) -> Run:
        outbox = self._outbox(resume.mark)
        if outbox.is_empty:
            for key in resume.metrics:
                outbox.seed(key, self.history(resume.id, key))
        outbox.forget("end")
        if outbox.fact("born") is None:  # the outbox it began with is delivered, and gone
            tags = {key: resume.tags[key] for key in RECOGNISED if key in resume.tags}
            born = {"mark": resume.mark, "name": name, "tags": tags, "started": resume.started}
            outbox.set_fact("born", born)
            outbox.set_fact("run", resume.id)
        outbox.put("status", "status", "RUNNING")
        outbox.put("untag", "error")
        return Run(self, resume.id, name, outbox, Sender(outbox, self, reason=self.away))

    def _outbox(self, name: str) -> Outbox:
        """A run's outbox, which knows where it is to be delivered."""
        outbox = Outbox(outbox_root() / name, patience=STALL_SECONDS)
        outbox.set_fact("store", {"uri": without_password(self.uri), "is_local": self.is_local,
                                  "experiment": self.config.experiment})  # fmt: skip
        return outbox

    def _end(self, run: Run, status: str) -> None:
        waiting = run.sender.drain(max(self.patience, STALL_SECONDS))
        run.sender.stop()
        refused = run.metrics.refused()
        run.id = str(run.metrics.fact("run") or run.id)
        run.answers = run.metrics.answers()
        # A stopped run may be gone on with while the store is away: its outbox knows how it began.
        lost = run.metrics.close(ended=not (status == "KILLED" and self.may_be_away))
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

    def has_artifact(self, run_id: str, path: str) -> bool:
        """Whether a run has a file among its artifacts."""
        return any(one.path == path for one in self.client.list_artifacts(run_id, path.rpartition("/")[0] or None))

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
        if not run_id.strip():
            raise TrackingError("The run's id is empty: `elman runs` lists them.")
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
            if run.id.startswith(run_id) or run.name == run_id or (len(run_id) > 7 and run.mark.startswith(run_id))
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


def _as_text(value: object) -> str:
    """A setting's value as MLflow shows it: text bare, everything else as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value)
