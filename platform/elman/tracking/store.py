"""The MLflow store: where it is, and a run's life in it.

The status of a run is ours to set: FINISHED, FAILED with the error's first line, or
KILLED where the user stopped it.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from elman.config.load import dump_yaml
from elman.config.schema import ExperimentConfig, TrackingConfig
from elman.config.tree import flatten, signature
from elman.errors import TrackingError
from elman.tracking.buffer import MetricBuffer

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A server that is away is noticed in seconds, not in MLflow's four minutes; nobody is told of our runs.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

LOCAL_ROOT = "mlruns"

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


def tracking_uri(config: TrackingConfig) -> str:
    """The URI in force: the setting, else MLFLOW_TRACKING_URI, else sqlite under ./mlruns."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local_root() / 'mlflow.db'}"


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


def _is_absence(error: Exception) -> bool:
    """Whether nobody answered, rather than that the answer was no."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        if error.error_code == "TEMPORARILY_UNAVAILABLE":
            return True
        text = str(error)
        return error.error_code == "INTERNAL_ERROR" and any(
            sign in text for sign in ("OperationalError", "API request to", "Connection refused", "server closed")
        )
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in ("requests", "urllib3")


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


class RunStore:
    """A tracking store, opened.

    Args:
        config: Where it is.
        patience: Seconds for which a call is tried again while nobody answers; the first one never waits.

    Raises:
        TrackingError: It cannot be reached or written.
    """

    def __init__(self, config: TrackingConfig | None = None, *, patience: float = 0.0) -> None:
        self.config = config or TrackingConfig()
        self.uri = tracking_uri(self.config)
        self.is_local = self.uri == f"sqlite:///{local_root() / 'mlflow.db'}"
        self.client = self._connect()
        if patience:
            self.client = cast("MlflowClient", PatientClient(self.client, patience))

    def _connect(self) -> MlflowClient:
        # MLflow announces every database migration, and urllib3 every attempt to reach a server: what
        # comes of them is said once, by us.
        for name in ("alembic", "mlflow.store.db.utils", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            if self.is_local:
                root = local_root()
                root.mkdir(parents=True, exist_ok=True)
                # Two processes that create the tables at once crash each other.
                with (root / ".lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    return self._client()
            return self._client()
        except OSError as error:
            raise TrackingError(
                f"{local_root()} cannot be written ({error.strerror}): run where you may write, or set tracking.uri."
            ) from None

    def _client(self) -> MlflowClient:
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.get_experiment_by_name(self.config.experiment)
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, MlflowException) and type(error).__module__.split(".")[0] not in (
                "sqlalchemy", "requests", "urllib3",
            ):  # fmt: skip
                raise
            raise TrackingError(
                f"The tracking store {without_password(self.uri)} cannot be used "
                f"({without_password(str(error)).splitlines()[0][:200]}): "
                "start its server, or set tracking.uri or MLFLOW_TRACKING_URI to another."
            ) from None
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
        resume: str | None = None,
    ) -> Iterator[Run]:
        """Open a run, or open one again; its end decides the status.

        Args:
            name: What the UI calls it.
            params: Recorded with it, once.
            tags: Recorded with it.
            parent: Id of the run that it belongs to.
            files: Text artifacts that it begins with.
            resume: Id of a run to go on with; its params and files stand.
        """
        from mlflow.entities import Param

        experiment_id = self.experiment_id()
        if resume is not None:
            self.client.update_run(resume, status="RUNNING")
            if "error" in self.client.get_run(resume).data.tags:
                self.client.delete_tag(resume, "error")
            run = Run(self, resume, experiment_id, name)
        else:
            described = {**tags, "mlflow.source.name": "elman", "mlflow.source.type": "LOCAL",
                         "mlflow.user": getpass.getuser()}  # fmt: skip
            if parent is not None:
                described["mlflow.parentRunId"] = parent
            created = self.client.create_run(experiment_id, run_name=name, tags=described)
            run = Run(self, created.info.run_id, experiment_id, name)
        status = "FAILED"
        try:
            if resume is None:
                shown = [Param(key, without_password(value)) for key, value in params.items()]
                self.client.log_batch(run.id, params=shown)
                for file, text in (files or {}).items():
                    run.log_text(file, without_password(text))
            yield run
            status = "FINISHED"
        except StoppedError as stop:
            status, stop.run_id = "KILLED", run.id
            raise
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            self.client.set_tag(run.id, "error", first_line(error))
            raise
        finally:
            run.flush()
            self.client.set_terminated(run.id, status=status)

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
                raise TrackingError(f"There is no run {run_id} in {without_password(self.uri)}.") from None
        matches = [run for run in self.runs(every_experiment=True) if run.id.startswith(run_id) or run.name == run_id]
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


class Run:
    """A run that is being written."""

    def __init__(self, store: RunStore, run_id: str, experiment_id: str, name: str) -> None:
        self.store, self.id, self.experiment_id, self.name = store, run_id, experiment_id, name
        self.metrics = MetricBuffer(store.client, run_id)

    def flush(self) -> None:
        """Deliver every metric that still waits."""
        self.metrics.close()

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags, in one request."""
        from mlflow.entities import RunTag

        self.store.client.log_batch(self.id, tags=[RunTag(key, str(value)[:5000]) for key, value in tags.items()])

    def describe(self, markdown: str) -> None:
        """What the UI shows as the run's description."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_text(self, name: str, text: str) -> None:
        """A text artifact; the same name again replaces it."""
        self.store.client.log_text(self.id, text, name)

    def log_json(self, name: str, value: object) -> None:
        """A JSON artifact."""
        self.log_text(name, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file as artifact, under its own name."""
        self.store.client.log_artifact(self.id, str(path), folder)

    def log_figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure as PNG; its name may have a folder."""
        place = PurePosixPath(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / place.name
            figure.savefig(path, dpi=120, bbox_inches="tight")
            self.log_file(path, None if place.parent == PurePosixPath() else str(place.parent))

    def log_dataset(self, *, name: str, digest: str, source: str, splits: Mapping[str, Mapping[str, object]]) -> None:
        """The corpus as MLflow inputs: one per split, with its sizes as profile."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                # MLflow keeps 36 characters of a digest; the whole one is a tag of the run.
                Dataset(
                    name=f"{name}/{split}",
                    digest=digest[:16],
                    source_type="text",
                    source=json.dumps({"source": source}),
                    schema=json.dumps({"mlflow_colspec": [{"type": "string", "name": "text", "required": True}]}),
                    profile=json.dumps(dict(profile)),
                ),
                tags=[InputTag("mlflow.data.context", split)],
            )
            for split, profile in splits.items()
        ]
        self.store.client.log_inputs(self.id, inputs)


def first_line(error: BaseException) -> str:
    """What an error says, fit to be shown in a line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_password(line)[:500]


def _as_text(value: object) -> str:
    """A setting's value as MLflow shows it: text bare, everything else as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value)
