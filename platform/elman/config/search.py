"""What a search is told, declared once: the study, how it is run, and its ceilings.

The space itself is not declared here: it names settings of schema.py, whose types are
the distributions' types. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from elman.config.schema import check_name, require

Sampler = Literal["grid", "random", "tpe", "gp", "cmaes", "nsga2"]
Pruner = Literal["none", "median", "successive_halving", "hyperband", "wilcoxon", "patience"]
Direction = Literal["minimize", "maximize"]

METRICS = (
    "val/loss", "val/perplexity", "val/bits_per_byte", "val/bits_per_character", "val/accuracy",
    "model/parameters", "throughput/milliseconds_per_token", "training/seconds",
)  # fmt: skip
"""What a study can optimise."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is looked for, and how."""

    name: str = "study"
    """What the study is called; the same name goes on with it."""
    metric: str | tuple[str, ...] = "val/bits_per_byte"
    """Figure of the best checkpoint to optimise; a list of two gives the Pareto front."""
    direction: Direction | tuple[Direction, ...] = "minimize"
    """Minimize or maximize, or a list of one for each metric."""
    sampler: Sampler = "tpe"
    """How trials are chosen: grid (each point once), random, tpe (Bergstra et al. 2011), gp (Gaussian
    process), cmaes (Hansen 2016) or nsga2 (Deb et al. 2002)."""
    pruner: Pruner = "none"
    """What ends a hopeless trial early: none, median, successive_halving, hyperband, patience, or
    wilcoxon over the folds of a cross-validation."""
    pruner_startup: int = 5
    """Trials that finish before median begins to prune."""
    pruner_patience: int = 2
    """Validations without improvement that patience tolerates."""
    trials: int | None = None
    """Trials, completed or pruned, that end the study; null leaves the end to minutes or to the grid, and is 20
    where there is neither."""
    minutes: float | None = None
    """Minutes, wall clock, of one call of the command; null sets no limit."""
    folds: int | None = None
    """Folds of cross-validation over contiguous blocks of text; the metric is their mean. Null holds out
    the validation split instead."""
    choose: Literal["best", "one_standard_error"] = "best"
    """Which trial wins: the best, or the smallest model within one standard error of it (with folds)."""
    seed: int = 1
    """Seed of the sampler; that of the trainings is the experiment's own."""

    def __post_init__(self) -> None:
        check_name("study.name", self.name)
        require(1 <= len(self.metrics) <= 2 and len(set(self.metrics)) == len(self.metrics), "study.metric",
                self.metric, "one metric, or a list of two")
        for metric in self.metrics:
            require(metric in METRICS, "study.metric", metric, f"one of {', '.join(METRICS)}")
        require(isinstance(self.direction, str) or len(self.direction) == len(self.metrics), "study.direction",
                self.direction, "one direction, or one for each metric")
        for name in ("trials", "pruner_startup", "pruner_patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"study.{name}", value, "at least 1")
        require(self.minutes is None or (self.minutes > 0 and isfinite(self.minutes)), "study.minutes", self.minutes,
                "a positive number")
        require(self.folds is None or self.folds >= 2, "study.folds", self.folds, "at least 2, or null")
        require(0 <= self.seed < 2**32, "study.seed", self.seed, "from 0 to 4294967295")
        if self.pruner != "none":
            require(len(self.metrics) == 1, "study.pruner", self.pruner, "none with two metrics")
            require(self.metrics[0].startswith("val/"), "study.pruner", self.pruner,
                    f"none with study.metric {self.metrics[0]}, which is not known before a training ends")
        if self.pruner == "wilcoxon":
            require(self.folds is not None, "study.pruner", self.pruner,
                    "another where study.folds is null: it compares folds")
        if self.folds is not None:
            require(self.pruner not in ("hyperband", "successive_halving", "patience"), "study.pruner", self.pruner,
                    "none, median or wilcoxon with study.folds: the others cut one training short")
        if self.choose == "one_standard_error":
            require(self.folds is not None, "study.choose", self.choose, "best where study.folds is null")
            require(len(self.metrics) == 1, "study.choose", self.choose, "best with two metrics")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, as a tuple."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def directions(self) -> tuple[Direction, ...]:
        """A direction for each metric."""
        return (self.direction,) * len(self.metrics) if isinstance(self.direction, str) else self.direction


@dataclass(frozen=True, kw_only=True)
class SearchRunConfig:
    """How a search is run, and what becomes of its answer."""

    workers: int = 1
    """Processes that train trials side by side, each with its share of the cores (or a GPU of its own)."""
    storage: str | None = None
    """Where the study is kept: a database URL (sqlite, postgresql, mysql), journal:PATH, or grpc://HOST:PORT
    of an Optuna proxy. Null takes sqlite under ./mlruns."""
    seeds: int = 1
    """Seeds with which the best settings are trained again, in full, and tested; 0 leaves that out."""
    keep_checkpoints: int = 3
    """Best trials whose checkpoints are kept."""
    register: str | None = None
    """Name under which the retrained model is registered; null takes the study's name."""

    def __post_init__(self) -> None:
        require(1 <= self.workers <= 1024, "search.workers", self.workers, "from 1 to 1024")
        require(0 <= self.seeds <= 100, "search.seeds", self.seeds, "from 0 to 100")
        require(self.keep_checkpoints >= 0, "search.keep_checkpoints", self.keep_checkpoints, "zero or more")
        check_name("search.register", self.register)


@dataclass(frozen=True, kw_only=True)
class ConstraintsConfig:
    """Ceilings; a trial beyond one is pruned, and the sampler learns to keep away."""

    parameters: int | None = None
    """Most parameters of a model; a larger one is not trained."""
    minutes: float | None = None
    """Most minutes of one training (of one fold); a longer one is cut off."""

    def __post_init__(self) -> None:
        require(self.parameters is None or self.parameters >= 1, "constraints.parameters", self.parameters,
                "at least 1, or null")
        require(self.minutes is None or (self.minutes > 0 and isfinite(self.minutes)), "constraints.minutes",
                self.minutes, "a positive number, or null")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Everything about a search but the experiment and the space."""

    study: StudyConfig = field(default_factory=StudyConfig)
    search: SearchRunConfig = field(default_factory=SearchRunConfig)
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
