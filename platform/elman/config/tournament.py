"""What a tournament is told, declared once, and a tournament file, read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from elman.config.load import read_settings, read_yaml
from elman.config.plan import check_keys, flat_space, naming, section
from elman.config.schema import ExperimentConfig, check_name, require
from elman.config.search import Sampler
from elman.config.tree import build, flatten_mapping, settings
from elman.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TournamentConfig:
    """What the contestants have in common."""

    name: str = "tournament"
    """What the tournament is called."""
    parameters: int | None = None
    """Parameters of every contestant's model, from which its hidden size follows; null leaves sizes as they are."""
    minutes: float | None = None
    """Minutes of training, wall clock, of every contestant; null leaves the experiment's limits as they are."""
    seeds: int = 3
    """Seeds with which each contestant is trained; the same ones for all."""
    trials: int = 4
    """Trials of each contestant's own search over the space; 0 searches nothing."""
    sampler: Sampler = "tpe"
    """Sampler of those searches."""
    seed: int = 1
    """Seed of the searches and of the bootstrap."""

    def __post_init__(self) -> None:
        check_name("contest.name", self.name)
        require(self.parameters is None or self.parameters >= 1, "contest.parameters", self.parameters,
                "at least 1, or null")
        require(self.minutes is None or (self.minutes > 0 and isfinite(self.minutes)), "contest.minutes",
                self.minutes, "a positive number, or null")
        require(1 <= self.seeds <= 100, "contest.seeds", self.seeds, "from 1 to 100")
        require(0 <= self.trials <= 10_000, "contest.trials", self.trials, "from 0 to 10000")
        require(0 <= self.seed < 2**32, "contest.seed", self.seed, "from 0 to 4294967295")
        if self.parameters is None and self.minutes is None:
            raise ConfigError(
                "contest.parameters and contest.minutes are both null: set one, or contestants do not compare."
            )


@dataclass(frozen=True, kw_only=True)
class TournamentSettings:
    """Everything about a tournament but the contestants, the experiment and the space."""

    contest: TournamentConfig = field(default_factory=lambda: TournamentConfig(parameters=100_000))


@dataclass(frozen=True)
class TournamentPlan:
    """A tournament file, read.

    Attributes:
        source: The file, for messages.
        contestants: Name → its experiment, at the common budget.
        space: What each contestant's own search varies, as the file has it.
    """

    source: str
    config: TournamentConfig
    contestants: dict[str, ExperimentConfig]
    space: dict[str, Any]


KEYS = ("base", "settings", "contest", "contestants", "space")


def load_tournament(path: str | Path, flags: Mapping[str, Any] | None = None) -> TournamentPlan:
    """The tournament that a file and flags make.

    Args:
        path: Of the file; paths in it are relative to its folder.
        flags: Dotted settings of the tournament or of every contestant's experiment; they win.

    Raises:
        ConfigError: Something is refused; the line names the file or the flag.
    """
    with naming(path, flags or {}):
        return _plan(path, read_yaml(path), dict(flags or {}))


def _plan(path: str | Path, tree: Mapping[str, Any], given: Mapping[str, Any]) -> TournamentPlan:
    check_keys(path, tree, KEYS, "a tournament file")
    own = {name: value for name, value in given.items() if name in settings(TournamentSettings)}
    changes = {name: value for name, value in given.items() if name not in own}
    flat = {"contest.name": Path(path).stem}
    flat |= flatten_mapping(TournamentSettings, {"contest": section(path, tree, "contest")}) | own
    config = build(TournamentSettings, {"contest.parameters": None, **flat}).contest
    base: dict[str, Any] = {}
    if tree.get("base") is not None:
        base = read_settings(ExperimentConfig, Path(path).parent / str(tree["base"]))
    base |= flatten_mapping(ExperimentConfig, section(path, tree, "settings"))
    contestants = section(path, tree, "contestants")
    if len(contestants) < 2:
        raise ConfigError("contestants must be two or more, each a name with its settings.")
    budget: dict[str, Any] = {"tracking.register": None}
    if config.parameters is not None:
        budget["model.parameter_budget"] = config.parameters
    if config.minutes is not None:
        budget |= {"trainer.max_minutes": config.minutes, "trainer.max_epochs": None, "trainer.max_steps": None}
    experiments = {}
    for name, differs in contestants.items():
        check_name("contestants", str(name))
        if differs is not None and not isinstance(differs, Mapping):
            raise ConfigError(f"contestants.{name} must be a mapping of settings, got {differs!r}.")
        try:
            merged = base | flatten_mapping(ExperimentConfig, differs or {}) | changes | budget
            experiments[str(name)] = build(ExperimentConfig, {**merged, "name": f"{config.name}-{name}"})
        except ConfigError as error:
            raise ConfigError(f"contestants.{name}: {error}") from None
    space = flat_space(path, tree["space"]) if config.trials and tree.get("space") is not None else {}
    return TournamentPlan(str(path), config, experiments, space)
