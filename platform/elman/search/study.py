"""A search from its file to its answer: the study, its record, the best settings trained again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study

from elman.config.load import dump_yaml
from elman.config.plan import SearchPlan
from elman.config.schema import CorpusConfig, ExperimentConfig
from elman.config.search import SearchConfig
from elman.config.tree import flatten, override, signature
from elman.data.datamodule import check_lengths
from elman.errors import ConfigError, SearchSpaceError, TrackingError, without_password
from elman.models.count import count_parameters
from elman.search.agents import Agent
from elman.search.answer import SearchResult, conclude
from elman.search.driver import Driver
from elman.search.pool import Pool
from elman.search.samplers import build_pruner
from elman.search.space import Space
from elman.search.storage import PATIENCE_SECONDS, close_storage, default_storage, open_storage
from elman.search.tally import ranking, tally
from elman.tasks.hardware import resolve_device
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus
from elman.tracking.store import Run, RunStore
from elman.training.callbacks import StopSignals
from elman.training.experiment import run_lengths
from elman.training.progress import Reporter, Silence, duration


def run_search(
    plan: SearchPlan,
    reporter: Reporter | None = None,
    make_pool: Callable[..., Pool] = Pool,
    parent: str | None = None,
) -> SearchResult:
    """Run a study, or go on with it, and train the best settings again.

    Args:
        plan: The search file, read.
        reporter: Watches.
        make_pool: Starts the workers; takes what ``Pool`` takes.
        parent: Id of the run that the study's belongs to.

    Raises:
        ElmanError: The file, the space, the corpus or the storage cannot be used; no trial has begun.
        SearchFailedError: No trial completed.
        StoppedError: The user stopped it; the same command goes on with it.
    """
    reporter = reporter or Silence()
    begun = time.monotonic()
    space = Space(plan)
    config = plan.config
    check_storage(config)
    device = resolve_device(plan.base.trainer.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    with StopSignals() as signals:
        # They come up while the corpus is prepared.
        pool = make_pool(config.search.workers, plan.base.trainer.threads, plan.base.tracking, gpus)
        storage = None
        try:
            corpora = [prepare(c, progress=reporter.stage) for c in _corpora(plan)]
            _check_corpus(space, corpora[-1])
            store = RunStore(plan.base.tracking, patience=PATIENCE_SECONDS)
            storage = open_storage(config.search.storage, reporter.note)
            study = _open_study(plan, storage, corpora[0])
            study.set_user_attr("finished", False)
            for point in space.enqueued if config.study.sampler != "grid" else []:
                if not any(t.user_attrs.get("known") == json.dumps(point) for t in study.get_trials(deepcopy=False)):
                    study.enqueue_trial(space.stored(point), user_attrs={"known": json.dumps(point)})
            study.pruner = build_pruner(config.study, _validations(plan.base, corpora[0]))
            with _study_run(plan, store, study, corpora[0], parent) as run:
                reporter.note(f"study {config.study.name}: run {run.id}")
                driver = Driver(
                    study, space, config, store, run.id, pool, _parameters, _progress(reporter), reporter.note
                )
                driver.run(signals)
                signals.at_once = True
                return conclude(plan, space, study, store, run, reporter, pool.threads, begun)
        finally:
            pool.close()
            reporter.close()
            if storage is not None:
                close_storage(storage)


def join_study(name: str, plan_config: SearchConfig, base: ExperimentConfig, reporter: Reporter) -> int:
    """Add this machine's workers to a study that another process drives; returns the trials they trained.

    Args:
        name: The study's.
        plan_config: For the storage and the workers.
        base: For where to record, the device and the threads.
        reporter: Watches.

    Raises:
        TrackingError: There is no such study there, or its runs are recorded elsewhere.
    """
    kept = plan_config.search.storage or ""
    path = kept.removeprefix("sqlite:///").removeprefix("journal:")
    if path != kept and not Path(path).exists():  # to open it would make it
        raise TrackingError(f"--join {name}: {path} does not exist: --storage must be where the study is kept.")
    storage = open_storage(plan_config.search.storage, reporter.note)
    study = _find_study(storage, name, plan_config.search.storage)
    facts = study.user_attrs.get("elman", {})
    store = RunStore(base.tracking)
    parent = study.user_attrs.get("mlflow_run")
    if parent is not None and not store.exists(parent):
        raise TrackingError(
            f"tracking.uri {without_password(store.uri)} does not hold the study's run {parent}: "
            "set it to the store that the search records in."
        )
    if facts:
        _check_same_text(facts, reporter)
    device = resolve_device(base.trainer.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    with StopSignals() as signals:
        pool = Pool(plan_config.search.workers, base.trainer.threads, base.tracking, gpus)
        agent = Agent(study, pool, reporter.note)
        try:
            reporter.note(f"serving study {name} with {plan_config.search.workers} workers (Ctrl-C leaves it)")
            agent.run(signals)
        finally:
            pool.close()
            reporter.close()
            close_storage(storage)
    return agent.done


def check_storage(config: SearchConfig) -> None:
    """Refuse what cannot work before anything is started."""
    storage = config.search.storage
    if storage is not None and storage.strip() == "":
        raise ConfigError("search.storage must be a database URL, journal:PATH or grpc://HOST:PORT, got ''.")


def _check_same_text(facts: Mapping[str, Any], reporter: Reporter) -> None:
    from elman.config.load import from_flat

    corpus = prepare(from_flat(facts["base"]).corpus, progress=reporter.stage)
    if corpus.digest != facts["digest"]:
        raise ConfigError(
            f"corpus.name {corpus.name} is another text here than where the search runs (digest {corpus.digest[:12]}, "
            f"there {facts['digest'][:12]}): bring the same files."
        )


def _find_study(storage: optuna.storages.BaseStorage, name: str, url: str | None) -> Study:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = sorted(summary.study_name for summary in storage.get_all_studies())
        there = f"it holds {', '.join(known[:10])}" if known else "it holds none"
        place = without_password(url or default_storage())
        raise TrackingError(f"--join {name}: there is no such study in {place}; {there}.") from None


def _corpora(plan: SearchPlan) -> list[CorpusConfig]:
    """The experiment's corpus and the folds of it. Prepared before any worker asks for them."""
    folds = range(plan.config.study.folds or 0)
    changes = [{"corpus.folds": plan.config.study.folds, "corpus.fold": fold} for fold in folds]
    return [plan.base.corpus, *(override(plan.base, change).corpus for change in changes)]


def _check_corpus(space: Space, corpus: PreparedCorpus) -> None:
    """A space whose every corner fits the schema may still ask for windows longer than the text."""
    for point in space.corners():
        experiment = space.experiment(point)
        if experiment.corpus == space.base.corpus:
            check_lengths(corpus, experiment.data)


def _validations(base: ExperimentConfig, corpus: PreparedCorpus) -> int | None:
    """Validations in a whole training, where steps or epochs bound it."""
    steps = run_lengths(base, corpus)
    if steps is None:
        return None
    every = base.trainer.validate_every_steps
    if every is None:
        return base.trainer.max_epochs if base.trainer.max_steps is None else None
    return max(1, math.ceil(steps / every))


def _facts(plan: SearchPlan, corpus: PreparedCorpus) -> dict[str, Any]:
    """What a study must have in common with an earlier one of its name to go on with it."""
    study = plan.config.study
    kept = {"metric": study.metrics, "direction": study.directions, "folds": study.folds, "seed": study.seed,
            "constraints": flatten(plan.config.constraints), "space": plan.space, "base": signature(plan.base),
            "digest": corpus.digest}  # fmt: skip
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=list).encode()).hexdigest()[:16]
    flat = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(plan.base).items()}
    return {"signature": digest, "base": flat, "digest": corpus.digest, "space": plan.space}


def _open_study(plan: SearchPlan, storage: optuna.storages.BaseStorage, corpus: PreparedCorpus) -> Study:
    config = plan.config.study
    facts = _facts(plan, corpus)
    study = optuna.create_study(
        study_name=config.name, storage=storage, directions=list(config.directions), load_if_exists=True
    )
    known = study.user_attrs.get("elman")
    if known is None:
        study.set_user_attr("elman", facts)
        _name_metrics(study, config.metrics)
    elif known["signature"] != facts["signature"]:
        raise SearchSpaceError(
            f"{plan.source}: study.name {config.name} is an earlier study with another space, experiment, text, "
            "metric, folds or seed: go back to those, or choose another name."
        )
    return study


def _name_metrics(study: Study, metrics: Sequence[str]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(metrics))


def _study_run(
    plan: SearchPlan, store: RunStore, study: Study, corpus: PreparedCorpus, parent: str | None
) -> Any:
    """The study's own run: a new one, or the one that an interrupted call began."""
    config = plan.config
    earlier = study.user_attrs.get("mlflow_run")
    params = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(config).items()}
    params |= {f"space.{name}": json.dumps(value) for name, value in plan.space.items()}
    base = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(plan.base).items()}
    tags = {"study.name": config.study.name, "corpus.digest": corpus.digest, "kind": "search"}
    resume = store.find_run(earlier) if earlier is not None and store.exists(earlier) else None
    opened = store.open_run(
        config.study.name, base | params, tags, resume=resume, parent=parent,
        files={"search.yaml": _as_yaml(plan), "base.yaml": dump_yaml(plan.base)},
    )  # fmt: skip
    return _Noted(opened, study)


class _Noted:
    """A run whose id the study remembers."""

    def __init__(self, opened: Any, study: Study) -> None:
        self._opened, self._study = opened, study

    def __enter__(self) -> Run:
        run: Run = self._opened.__enter__()
        self._study.set_user_attr("mlflow_run", run.id)
        return run

    def __exit__(self, *exception: Any) -> Any:
        return self._opened.__exit__(*exception)


def _as_yaml(plan: SearchPlan) -> str:
    import yaml

    from elman.config.tree import nest

    flat = {key: list(v) if isinstance(v, tuple) else v for key, v in flatten(plan.config).items()}
    tree = {**nest(flat), "space": plan.space, "enqueue": list(plan.enqueue)}
    return "# The experiment that this search varies is base.yaml beside it.\nbase: base.yaml\n" + yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=True
    )


@lru_cache(maxsize=4)
def _vocabulary(config: CorpusConfig) -> Any:
    return prepare(config).tokenizer


def _parameters(experiment: ExperimentConfig) -> int:
    """Parameters of an experiment's model, counted without making it."""
    from elman.training.experiment import build_language_model

    with torch.device("meta"):
        return count_parameters(build_language_model(experiment, _vocabulary(experiment.corpus)))["total"]


def _progress(reporter: Reporter) -> Callable[[Driver], None]:
    def show(driver: Driver) -> None:
        counts = tally(driver.study.get_trials(deepcopy=False))
        config = driver.config.study
        wanted = driver.wanted
        ranked = ranking(driver.study)
        best = f", best {ranked[0].values[0]:.4f} (trial {ranked[0].number})" if ranked else ""
        elapsed = time.time() - driver.begun
        shares = [counts.spent / wanted] if wanted else []
        if config.minutes is not None:
            shares.append(elapsed / (60 * config.minutes))
        share = min(1.0, max(shares, default=0.0))
        done_here = counts.spent - driver.spent_before
        left = ""
        if driver.deadline is not None:
            left = f", {duration(max(0.0, driver.deadline - time.time()))} left"
        if wanted and done_here > 0:
            rest = elapsed / done_here * (wanted - counts.spent)
            if driver.deadline is not None:
                rest = min(rest, max(0.0, driver.deadline - time.time()))
            left = f", {duration(rest)} left"
        total = f"/{wanted}" if wanted else ""
        others = "".join(f", {n} {word}" for n, word in ((counts.pruned, "pruned"), (counts.failed, "failed")) if n)
        figures = f"{counts.spent}{total} trials{others}, {driver.running} running{best}{left}"
        reporter.stage("searching", share, figures)

    return show
