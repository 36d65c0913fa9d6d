"""Going on with a run: from which state, and with which settings.

A run goes on where its newest sound state stands, and to the bit as if it had never
stopped. So everything that shapes the training must be what it was; how long it lasts,
and how often one looks, may change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elman.config.load import from_flat, load_config, read_settings
from elman.config.schema import ExperimentConfig
from elman.config.tree import flatten, override, signature
from elman.errors import ConfigError, DataError, ModelError, TrackingError, UnusableCheckpointsError, without_password
from elman.models.language_model import LanguageModel
from elman.text.prepared import PreparedCorpus
from elman.tracking.local import RunSummary, find_local, local_file, local_runs, opened, outbox_root
from elman.tracking.store import RunStore
from elman.training.checkpoint import BEST, LAST, STATE, States, write_whole
from elman.training.loading import provenance, read_checkpoint
from elman.training.lock import FolderLock, is_interrupted

CHANGEABLE = frozenset(
    {
        "trainer.max_epochs", "trainer.max_steps", "trainer.max_minutes", "trainer.patience", "trainer.threads",
        "trainer.log_every_steps", "trainer.checkpoint_every_steps", "trainer.checkpoint_minutes",
        "trainer.sample_prompt", "tracking.uri", "tracking.register", "tracking.system_metrics",
    }
)  # fmt: skip
"""Settings that may differ from then on."""

UNRECORDED = frozenset({"tracking.uri"})

SHAPELESS = tuple(sorted(name for name in CHANGEABLE if name.startswith(("tracking.", "trainer.checkpoint_"))))
"""Those of them that configurations of one signature may differ in."""


@dataclass
class Resumption:
    """A run to go on with, its folder locked.

    Attributes:
        run: As the store has it.
        config: Its settings, with the changes.
        changes: Setting → (before, after).
        states: Its states.
        path: The state to go on from; None where it was ended before it wrote one.
        checkpoint: What that state holds.
        notes: What the user should know.
    """

    run: RunSummary
    config: ExperimentConfig
    changes: dict[str, tuple[Any, Any]]
    states: States
    path: Path | None
    checkpoint: dict[str, Any] | None = field(repr=False)
    notes: list[str]
    begun: bool = False
    """Whether it goes on: until then, a refusal leaves no folder behind."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.checkpoint is None else int(self.checkpoint["global_step"])

    def check(self, corpus: PreparedCorpus, model: LanguageModel) -> None:
        """Refuse what would not go on with the same training.

        Raises:
            DataError: The text or the vocabulary has changed.
            ModelError: The architecture has.
        """
        if self.checkpoint is None:
            return
        extra, run = self.checkpoint["elman"], self.run.id[:12]
        began = extra["provenance"]["corpus_digest"]
        if corpus.digest != began:
            raise DataError(
                f"{corpus.source}: the text is not the one that run {run} began with (digest {corpus.digest[:12]}, "
                f"then {began[:12]}): restore it, or start a new run."
            )
        if json.loads(corpus.tokenizer.to_json()) != json.loads(extra["tokenizer"]):
            raise DataError(
                f"{corpus.source}: the vocabulary is not the one that run {run} began with: start a new run."
            )
        if model.architecture != extra["architecture"]:
            raise ModelError(f"The architecture is not the one that run {run} began with: start a new run.")

    def adopt(self, corpus: PreparedCorpus) -> None:
        """Write the changed settings into a state of their own: a kill must not undo them."""
        if self.checkpoint is None or self.path is None or not self.changes:
            return
        self.checkpoint["elman"] |= {"provenance": provenance(self.config, corpus)}
        best = self.path / BEST
        self.path = self.states.write(
            lambda path: write_whole(path, lambda file: torch.save(self.checkpoint, file)),
            (best, _digest(best)) if best.exists() else None,
        )

    def tags(self) -> dict[str, str]:
        """What the run records of this."""
        count = int(self.run.tags.get("resume.count", "0")) + 1
        changed = "".join(f"; {name} {old} → {new}" for name, (old, new) in self.changes.items())
        return {"resume.count": str(count), f"resume.{count}": f"from step {self.step}{changed}"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def resumed(
    reference: str, changes: Mapping[str, Any], store: RunStore, file: str | Path | None = None
) -> Iterator[Resumption]:
    """Find the run and its newest sound state, and hold its folder.

    Args:
        reference: The run's id, the beginning of it, or its name.
        changes: Dotted settings that shall differ from then on.
        store: Where the run is.
        file: YAML file of settings, as given at the start; it must not contradict the run.

    Raises:
        TrackingError: There is no such run, or another process trains it.
        ConfigError: The settings contradict the run's, or it has nothing left to do.
        ModelError: It left no state on this machine, nor among its artifacts.
        UnusableCheckpointsError: Every state is damaged.
    """
    run = find_to_resume(reference, store)
    if "trial.number" in run.tags:
        raise TrackingError(f"Run {run.id[:12]} is a trial of study {run.tags.get('study.name')}: search again.")
    folder = run.checkpoints
    trained_here = folder.exists()
    if run.status == "RUNNING" and not trained_here and "train/loss" in run.metrics:
        raise TrackingError(
            f"Run {run.id[:12]} is RUNNING, and not of this folder: whether anybody trains it can be told only where "
            "it was started. Resume it there."
        )
    with FolderLock(folder):
        try:
            found = _find(find_to_resume(run.id, store), States(folder), store, changes, file, trained_here)
        except BaseException:
            if not trained_here:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            yield found
        except BaseException:
            if not trained_here and not found.begun:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def find_to_resume(reference: str, store: RunStore) -> RunSummary:
    """A run as the store has it; while that is away, or has not heard of it, as its outbox on this machine does.

    Raises:
        TrackingError: There is no such run, or none whose outbox is here.
    """
    if store.away is None:
        try:
            return store.find_run(reference)
        except TrackingError:
            run = find_local(reference)
            if run is None or not run.is_unheard:
                raise
            return run
    run = find_local(reference)
    if run is None:
        raise TrackingError(
            f"The tracking store {without_password(store.uri)} does not answer ({store.away}), and {outbox_root()} "
            f"holds no run {reference} to go on with: start the server, or go to the folder where it was trained."
        )
    return run


def _find(
    run: RunSummary,
    states: States,
    store: RunStore,
    changes: Mapping[str, Any],
    file: str | Path | None,
    trained_here: bool,
) -> Resumption:
    notes = []
    path, damaged = states.find()
    if damaged and path is not None:
        names = ", ".join(str(one / STATE) for one in damaged)
        notes.append(f"warning: damaged, and passed over: {names}. Going on from {path / STATE}.")
    if path is None:
        path = _from_artifacts(run, states, store)
    if path is None:
        if not trained_here and "train/loss" in run.metrics:
            raise ModelError(
                f"Run {run.id[:12]} left no checkpoint here, nor among its artifacts: resume it on the machine, and "
                "in the folder, where it was started."
            )
        if (times := _validations(run, store)) > 1:  # a kill may come between the first and its checkpoint
            raise UnusableCheckpointsError(
                f"every checkpoint of run {run.id} is gone: {states.folder} has none, though it was validated {times} "
                "times. Restore one, or start a new run."
            )
        notes.append("it was ended before its first checkpoint, and begins again")
    checkpoint = None if path is None else _read_state(path)
    before = _begun_with(run, store) if checkpoint is None else from_flat(checkpoint["elman"]["provenance"]["config"])
    config, changed = _changed(run, before, changes, file)
    if run.status == "FINISHED" and not changed:
        raise ConfigError(
            f"Run {run.id[:12]} is finished: give --trainer.max_epochs, --trainer.max_steps or "
            "--trainer.max_minutes to train it further."
        )
    return Resumption(run, config, changed, states, path, checkpoint, notes)


def _validations(run: RunSummary, store: RunStore) -> int:
    """How often it was validated, as far as the store or its outbox here knows."""
    steps = {step for step, _ in store.history(run.id, "val/loss")} if store.away is None else set()
    if (folder := outbox_root() / run.mark).exists():
        with opened(folder) as outbox:
            if outbox is not None:
                steps |= {step for step, _ in outbox.history("val/loss")}
    return len(steps)


def find_unfinished(config: ExperimentConfig, digest: str, store: RunStore) -> RunSummary | None:
    """The newest run with these settings, on this text, that was stopped or killed; None where there is none.

    Args:
        config: The settings.
        digest: The corpus's.
        store: Where to look; while it is away, among the outboxes on this machine.
    """
    alike = {"config.signature": signature(config), "corpus.digest": digest}
    runs = [run for run in local_runs() if store.away is not None or run.is_unheard]
    if store.away is None:
        runs += store.runs(filter_string=" and ".join(f"tags.`{k}` = '{v}'" for k, v in alike.items()), limit=100)
    for run in sorted(runs, key=lambda run: run.started, reverse=True):
        if run.is_experiment and alike.items() <= run.tags.items() and "mlflow.parentRunId" not in run.tags:
            goes_on = is_interrupted(run) or (run.status == "KILLED" and _left_something(run, store))
            return run if goes_on else None
    return None


def _left_something(run: RunSummary, store: RunStore) -> bool:
    """Whether a run that was stopped can be gone on with from here."""
    if run.checkpoints.exists() or "train/loss" not in run.metrics:
        return True
    return store.away is None and store.has_artifact(run.id, f"checkpoints/{LAST}")


def _read_state(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path / STATE)
    if "resume" not in checkpoint:
        raise ModelError(f"{path / STATE} was written by an elman that could not resume: start a new run.")
    return checkpoint


def _from_artifacts(run: RunSummary, states: States, store: RunStore) -> Path | None:
    """The state that a run handed over when it ended."""
    with tempfile.TemporaryDirectory(dir=states.folder) as name:
        try:
            last = store.download(run.id, f"checkpoints/{LAST}", Path(name))
        except TrackingError:
            return None  # ended before its first checkpoint: it begins again, and repeats what it did
        try:
            best = store.download(run.id, f"checkpoints/{BEST}", Path(name))
        except TrackingError:
            best = None
        read_checkpoint(last)
        return states.write(
            lambda path: write_whole(path, lambda file: file.write(last.read_bytes())),
            None if best is None else (best, _digest(best)),
        )


def _begun_with(run: RunSummary, store: RunStore) -> ExperimentConfig:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        if (waiting := local_file(run, path.name)) is not None:
            path.write_bytes(waiting)
            return load_config(ExperimentConfig, path)
        try:
            path = store.download(run.id, path.name, Path(name))
        except TrackingError:
            raise ModelError(f"Run {run.id[:12]} ended before it began to train: start a new run.") from None
        return load_config(ExperimentConfig, path)


def _changed(
    run: RunSummary, before: ExperimentConfig, changes: Mapping[str, Any], file: str | Path | None
) -> tuple[ExperimentConfig, dict[str, tuple[Any, Any]]]:
    wanted = ({} if file is None else read_settings(ExperimentConfig, file)) | dict(changes)
    config = override(before, wanted)
    old, new = flatten(before), flatten(config)
    differ = {name: (old[name], new[name]) for name in new if new[name] != old[name]}
    for name, (was, becomes) in differ.items():
        if name not in CHANGEABLE:
            raise ConfigError(
                f"{name} is {was} in run {run.id[:12]} and cannot become {becomes} in the middle of it: "
                "leave it out, or start a new run."
            )
    return config, {name: pair for name, pair in differ.items() if name not in UNRECORDED}
