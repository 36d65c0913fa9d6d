"""One trial: its trainings, recorded as one run under the study's.

A trial of a cross-validation trains one model a fold; their curves stand side by side in
its run, under ``fold-1/``, ``fold-2/`` and so on.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import lightning as L

from elman.config.load import from_flat
from elman.config.schema import CorpusConfig, ExperimentConfig
from elman.data.datamodule import check_lengths
from elman.errors import DivergenceError, ElmanError
from elman.models.count import count_parameters
from elman.tasks.hardware import resolve_device, resolve_precision, set_threads
from elman.tasks.language_modeling import LanguageModeling
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus
from elman.tracking.logger import RunLogger
from elman.tracking.store import Run, RunStore, StoppedError
from elman.training.callbacks import StopSignals
from elman.training.experiment import (
    Fit,
    build_language_model,
    checkpoint_folder,
    final_figures,
    fit,
    run_name,
    run_tags,
)
from elman.training.progress import Silence


class PrunedError(Exception):
    """The trial is not worth going on with."""


@dataclass(frozen=True)
class Job:
    """What a worker is told of a trial; plain values, that travel through pipes and databases.

    Attributes:
        number: The trial's.
        study: The study's name.
        parent: Id of the study's run.
        configs: Flattened experiments: one, or one a fold.
        metrics: What the study optimises.
        report: Whether the trial may be pruned: None, ``validations`` or ``folds``.
        running_mean: Whether a fold reports the mean of the folds so far, rather than its own value.
        deadline: Seconds since 1970 at which the study's minutes are over.
        max_minutes: Ceiling on one training.
    """

    number: int
    study: str
    parent: str
    configs: list[dict[str, Any]]
    metrics: list[str]
    report: str | None = None
    running_mean: bool = True
    deadline: float | None = None
    max_minutes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        state: complete, pruned, failed or stopped.
        values: Of the study's metrics; empty unless complete.
        reason: Why it was pruned or failed.
        is_users: Whether a failure is a mistake of the user's, rather than ours.
        figures: By their names in MLflow: means over the folds.
        fold_values: The first metric, fold by fold.
        standard_error: Of their mean.
        fits: Trainings that came to their end.
        seconds: Wall time, all in all.
        run_id: Of the trial's run.
    """

    state: str
    values: list[float] = field(default_factory=list)
    reason: str = ""
    is_users: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    fold_values: list[float] = field(default_factory=list)
    standard_error: float | None = None
    fits: int = 0
    seconds: float = 0.0
    run_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


Report = Callable[[int, float], bool]
"""Step and value → whether to prune."""

Settle = Callable[[Outcome], bool]
"""Outcome → whether the checkpoint is worth keeping."""


def run_trial(job: Job, store: RunStore, report: Report, settle: Settle) -> None:
    """Train a trial and record it; whatever comes of it goes to ``settle``, once."""
    begun = time.monotonic()
    outcome = Outcome("failed")
    keep: list[bool] = []

    def conclude() -> bool:
        outcome.seconds = time.monotonic() - begun
        keep.append(settle(outcome))
        return keep[0]

    try:
        _run(job, store, report, outcome, conclude)
    except StoppedError as stop:
        outcome.state, outcome.reason = "stopped", str(stop)
    except ElmanError as error:
        outcome.state, outcome.reason, outcome.is_users = "failed", " ".join(str(error).split()), True
    except Exception as error:
        if keep:  # the trial was done, and recording its end failed: that is not the trial's
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        first_line = (str(error).strip() or "no message").splitlines()[0]
        outcome.state = "failed"
        outcome.reason = f"{type(error).__name__}: {first_line} ({where.filename}:{where.lineno})"
    if not keep:
        conclude()


def _run(job: Job, store: RunStore, report: Report, outcome: Outcome, conclude: Callable[[], bool]) -> None:
    configs = [from_flat(flat) for flat in job.configs]
    first = configs[0]
    set_threads(first.trainer.threads)
    device = resolve_device(first.trainer.device)
    precision = resolve_precision(first.trainer.precision, device)
    corpora = [_corpus(config.corpus) for config in configs]
    for config, corpus in zip(configs, corpora, strict=True):
        check_lengths(corpus, config.data)
    model = build_language_model(first, corpora[0].tokenizer)
    parameters = count_parameters(model)["total"]
    tags = run_tags(corpora[0], precision) | {"study.name": job.study, "trial.number": str(job.number)}
    name = f"{job.study}-{job.number} {run_name(first, model).removeprefix(first.name + '-')}"
    with StopSignals() as signals, store.start_run(first, name, tags, job.parent) as run:
        outcome.run_id = run.id
        folder = checkpoint_folder(run.id)
        fits: list[Fit] = []
        try:
            for index, (config, corpus) in enumerate(zip(configs, corpora, strict=True)):
                if index:
                    model = build_language_model(config, corpus.tokenizer)
                prefix = f"fold-{index + 1}/" if len(configs) > 1 else ""
                watcher = _Watcher(job, report)
                logger = RunLogger(run.metrics, run.name, run.id, prefix)
                fits.append(
                    fit(config, corpus, model, logger=logger, folder=folder, signals=signals, reporter=Silence(),
                        watchers=[watcher], device=device, precision=precision)
                )  # fmt: skip
                outcome.fits = len(fits)
                outcome.fold_values.append(_figures(fits[-1:], parameters)[job.metrics[0]])
                if job.report == "folds" and len(fits) < len(configs):
                    values = outcome.fold_values
                    if report(index, statistics.fmean(values) if job.running_mean else values[-1]):
                        raise PrunedError(f"pruned after fold {len(fits)} of {len(configs)}")
            outcome.state = "complete"
        except PrunedError as pruned:
            outcome.state, outcome.reason = "pruned", str(pruned)
        except DivergenceError as diverged:
            outcome.state, outcome.reason = "pruned", str(diverged)
        finally:
            if outcome.state == "failed":
                shutil.rmtree(folder, ignore_errors=True)
        signals.at_once = False  # a trial that is done is not stopped any more
        try:
            _record(run, job, outcome, fits, parameters)
            if conclude() and len(fits) == 1:
                run.log_file(fits[0].checkpoint, "checkpoints")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _record(run: Run, job: Job, outcome: Outcome, fits: list[Fit], parameters: int) -> None:
    outcome.figures = _figures(fits, parameters)
    tags = {"trial.state": outcome.state.upper()}
    if outcome.reason:
        tags["trial.reason"] = outcome.reason
    if outcome.state == "complete":
        outcome.values = [outcome.figures[metric] for metric in job.metrics]
        bad = next((v for v in outcome.values if not math.isfinite(v)), None)
        if bad is not None:
            outcome.state, outcome.values, outcome.reason = "pruned", [], f"its figure is {bad}"
            tags |= {"trial.state": "PRUNED", "trial.reason": outcome.reason}
    if len(outcome.fold_values) > 1:
        spread = statistics.stdev(outcome.fold_values)
        outcome.standard_error = spread / math.sqrt(len(outcome.fold_values))
        outcome.figures["cv/standard_error"] = outcome.standard_error
    run.metrics.add(outcome.figures, max((done.step for done in fits), default=0))
    run.set_tags(tags)


def _figures(fits: list[Fit], parameters: int) -> dict[str, float]:
    """Means over the folds, by the names that runs are compared by and those that a study optimises."""
    every = [
        final_figures(done, parameters)
        | {key: value for key, value in done.best.items() if key.startswith("val/")}
        | {"throughput/milliseconds_per_token": 1000 / max(done.tokens_per_second, 1e-9)}
        for done in fits
    ]
    return {name: statistics.fmean(one[name] for one in every) for name in (every[0] if every else ())}


@lru_cache(maxsize=16)
def _corpus(config: CorpusConfig) -> PreparedCorpus:
    """A worker opens each prepared corpus once."""
    return prepare(config)


class _Watcher(L.Callback):
    """Reports every validation, and ends the trial where it is hopeless or too long."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        self._validations = 0
        self._begun = time.monotonic()

    def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
        """Look at the clock."""
        job = self._job
        if job.max_minutes is not None and time.monotonic() - self._begun > 60 * job.max_minutes:
            raise PrunedError(f"longer than constraints.minutes {job.max_minutes:g}")
        if job.deadline is not None and time.time() > job.deadline:
            raise PrunedError("the study's minutes were over")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell how it stands."""
        assert isinstance(pl_module, LanguageModeling)
        if pl_module.validation is None or trainer.sanity_checking or self._job.report != "validations":
            return
        self._validations += 1
        value = pl_module.validation.metrics("val", pl_module.bits)[self._job.metrics[0]]
        if self._report(self._validations, value):
            raise PrunedError(f"pruned after validation {self._validations}")


def trial_configs(base: ExperimentConfig, folds: int | None) -> list[dict[str, Any]]:
    """The trainings of one trial: the experiment itself, or one for each fold."""
    from elman.config.tree import flatten, override

    if folds is None:
        return [flatten(base)]
    return [flatten(override(base, {"corpus.folds": folds, "corpus.fold": fold})) for fold in range(folds)]


def outcome_from(values: Mapping[str, Any]) -> Outcome:
    """An outcome that went through JSON."""
    return Outcome(**values)
