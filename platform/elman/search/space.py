"""The space: dotted settings with bounds or choices, from which points are drawn.

A search file gives bounds alone; whether a setting is an integer, a number or a choice is
the schema's to say. A dimension may hang on others (``when``): where its condition does
not hold, the setting keeps the base experiment's value and is no part of the point.
"""

from __future__ import annotations

import itertools
import json
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any, Literal, Union, get_args, get_origin

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from elman.config.plan import SearchPlan
from elman.config.schema import ExperimentConfig
from elman.config.tree import Setting, coerce, flatten, override, settings
from elman.errors import ConfigError, SearchSpaceError

Point = dict[str, Any]
"""Dotted setting → value; the settings whose condition holds."""

LARGEST_GRID = 100_000
LARGEST_CHECK = 2_000
"""Points of a space that are tried against the schema before the first trial."""

FORBIDDEN = ("name", "seed", "corpus.folds", "corpus.fold", "trainer.threads", "trainer.device", "tracking.")
"""What a search sets itself, or what changes no model."""


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched.

    Attributes:
        choices: Its values, or None where it has bounds.
        low: Lower bound.
        high: Upper bound, included.
        step: Distance between values; None, any number between.
        log: Whether equal ratios are equally likely, rather than equal differences.
        integer: Whether it takes whole numbers alone.
        when: Other dimensions or settings → the values of theirs at which this one is searched.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    integer: bool = False
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's view of it."""
        if self.choices is not None:
            return CategoricalDistribution([_stored(choice) for choice in self.choices])
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def active(self, values: Mapping[str, Any]) -> bool:
        """Whether it is searched where the others have these values."""
        return all(values[name] in allowed for name, allowed in self.when)

    def grid(self) -> list[Any]:
        """Every value.

        Raises:
            SearchSpaceError: It has bounds without a step.
        """
        if self.choices is not None:
            return list(self.choices)
        if self.step is None and not self.integer:
            raise SearchSpaceError(f"space.{self.name} needs a step, or a list of choices, for study.sampler grid.")
        step = self.step or 1
        if self.log:
            raise SearchSpaceError(f"space.{self.name}: a grid has no log scale; give a list of choices.")
        count = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(count)]
        return [round(v) if self.integer else float(f"{v:.12g}") for v in values]

    def extremes(self) -> list[Any]:
        """The values that a combination is most likely to fail at."""
        if self.choices is not None:
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.integer else [self.low, self.high]

    def draw(self, source: random.Random) -> Any:
        """Some value of it, for checking the space."""
        if self.choices is not None:
            return source.choice(self.choices)
        if self.step is not None or self.integer:
            step = self.step or 1
            value = self.low + step * source.randint(0, int((self.high - self.low) / step + 1e-9))
            return round(value) if self.integer else value
        return source.uniform(self.low, self.high)

    def suggest(self, trial: BaseTrial) -> Any:
        """The trial's value."""
        if self.choices is not None:
            return _restored(trial.suggest_categorical(self.name, [_stored(choice) for choice in self.choices]))
        if self.integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1)
        return (self.step is None and not self.integer) or self.log or isclose(steps, round(steps), abs_tol=1e-9)


def _stored(choice: Any) -> Any:
    """Optuna keeps scalars; a list goes as its JSON."""
    return f"json:{json.dumps(choice)}" if isinstance(choice, list | tuple) else choice


def _restored(choice: Any) -> Any:
    return tuple(json.loads(choice[5:])) if isinstance(choice, str) and choice.startswith("json:") else choice


class Space:
    """The dimensions of a search, in an order in which each comes after those it hangs on.

    Args:
        plan: The search file.

    Raises:
        SearchSpaceError: A bound, a choice, a condition or a combination is refused.
    """

    def __init__(self, plan: SearchPlan) -> None:
        self.base = plan.base
        self._flat = flatten(plan.base)
        self._source = plan.source
        try:
            self.dimensions = _ordered([_dimension(name, given) for name, given in plan.space.items()], self._flat)
            if plan.config.study.sampler == "grid":
                self.check_grid()
            else:
                self._check(self._some_points())
            self.enqueued = [self._complete(point, index) for index, point in enumerate(plan.enqueue, 1)]
        except SearchSpaceError as error:
            raise SearchSpaceError(f"{plan.source}: {error}") from None

    def experiment(self, point: Mapping[str, Any]) -> ExperimentConfig:
        """The base experiment with a point's values.

        Raises:
            ConfigError: The schema refuses the combination.
        """
        return override(self.base, point)

    def suggest(self, trial: BaseTrial) -> Point:
        """Let a trial choose a point."""
        return self._walk(lambda dimension: dimension.suggest(trial))

    def stored(self, point: Mapping[str, Any]) -> Point:
        """A point as Optuna keeps it."""
        return {name: _stored(value) for name, value in point.items()}

    def grid(self) -> list[Point]:
        """Every point, each once, the first dimension changing slowest."""
        points: list[Point] = []

        def extend(point: Point, rest: Sequence[Dimension]) -> None:
            if len(points) > LARGEST_GRID:
                raise SearchSpaceError(f"the grid has more than {LARGEST_GRID:,} points: choose fewer values.")
            if not rest:
                points.append(point)
            elif rest[0].active(self._flat | point):
                for value in rest[0].grid():
                    extend({**point, rest[0].name: value}, rest[1:])
            else:
                extend(point, rest[1:])

        extend({}, self.dimensions)
        return points

    def check_grid(self) -> None:
        """Try every point of the grid against the schema."""
        self._check(self.grid())

    def _walk(self, choose: Any) -> Point:
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.active(self._flat | point):
                point[dimension.name] = choose(dimension)
        return point

    def restored(self, params: Mapping[str, Any]) -> Point:
        """A point as Optuna kept it."""
        return {name: _restored(value) for name, value in params.items()}

    def corners(self) -> Iterator[Point]:
        """Points at the ends of the bounds, and at every choice."""
        corners = itertools.product(*(dimension.extremes() for dimension in self.dimensions))
        for corner in itertools.islice(corners, LARGEST_CHECK):
            values = dict(zip((d.name for d in self.dimensions), corner, strict=True))
            yield self._walk(lambda dimension, values=values: values[dimension.name])

    def _some_points(self) -> Iterator[Point]:
        yield from self.corners()
        source = random.Random(0)
        for _ in range(LARGEST_CHECK):
            yield self._walk(lambda dimension: dimension.draw(source))

    def _check(self, points: Iterator[Point] | list[Point]) -> None:
        for point in points:
            try:
                self.experiment(point)
            except ConfigError as error:
                shown = ", ".join(f"{name} {value!r}" for name, value in point.items())
                raise SearchSpaceError(f"space holds {shown}, which the schema refuses: {error}") from None

    def _complete(self, given: Mapping[str, Any], index: int) -> Point:
        """An enqueued point with the base experiment's values where it says nothing, and without what hangs loose."""
        point: Point = {}
        for dimension in self.dimensions:
            if not dimension.active(self._flat | point):
                continue
            value = given.get(dimension.name, self._flat[dimension.name])
            if not dimension.holds(value):
                raise SearchSpaceError(
                    f"enqueue, entry {index}: {dimension.name} {value!r} lies outside its bounds or choices."
                )
            point[dimension.name] = value
        return point


def _ordered(dimensions: list[Dimension], flat: Mapping[str, Any]) -> list[Dimension]:
    names = {dimension.name for dimension in dimensions}
    ordered: list[Dimension] = []
    waiting = list(dimensions)
    while waiting:
        placed = {dimension.name for dimension in ordered}
        ready = next((d for d in waiting if all(n in placed or n not in names for n, _ in d.when)), None)
        if ready is None:
            raise SearchSpaceError(f"space.{waiting[0].name}: the conditions (when) go round in a circle.")
        waiting.remove(ready)
        ordered.append(ready)
    for dimension in ordered:
        for name, _ in dimension.when:
            if name not in flat:
                raise SearchSpaceError(f"space.{dimension.name}: when names {name}, which is not a setting.")
    return ordered


_OPTIONS = ("choices", "low", "high", "step", "log", "when")


def _dimension(name: str, given: Any) -> Dimension:
    setting = settings(ExperimentConfig)[name]
    if any(name == other or (other.endswith(".") and name.startswith(other)) for other in FORBIDDEN):
        raise SearchSpaceError(f"space.{name} cannot be searched: a search sets it itself, or it changes no model.")
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, Mapping):
        raise SearchSpaceError(f"space.{name} must be a list of choices, or bounds (low, high), got {given!r}.")
    for key in given:
        if key not in _OPTIONS:
            raise SearchSpaceError(f"space.{name} has {key}: give choices, or low, high, step and log; and when.")
    when = _conditions(name, given.get("when"))
    if "choices" in given:
        return _choices(setting, given, when)
    return _bounds(setting, given, when)


def _choices(setting: Setting, given: Mapping[str, Any], when: tuple[tuple[str, tuple[Any, ...]], ...]) -> Dimension:
    values = given["choices"]
    if any(key in given for key in ("low", "high", "step", "log")):
        raise SearchSpaceError(f"space.{setting.name} has choices and bounds: give either.")
    if not isinstance(values, list) or not values:
        raise SearchSpaceError(f"space.{setting.name} must have at least one choice, got {values!r}.")
    checked = []
    for value in values:
        try:
            checked.append(coerce(setting, value))
        except ConfigError as error:
            raise SearchSpaceError(f"space.{error}") from None
        if checked[-1] in checked[:-1]:
            raise SearchSpaceError(f"space.{setting.name} has the choice {value!r} twice.")
    return Dimension(setting.name, choices=tuple(checked), when=when)


def _bounds(setting: Setting, given: Mapping[str, Any], when: tuple[tuple[str, tuple[Any, ...]], ...]) -> Dimension:
    name = setting.name
    number = _number(setting.type)
    if number is None:
        raise SearchSpaceError(f"space.{name} is not a number: give a list of choices.")
    for key in ("low", "high"):
        if key not in given:
            raise SearchSpaceError(f"space.{name} has no {key}: give low and high, or a list of choices.")
    for key in ("low", "high", "step"):
        value = given.get(key)
        if key == "step" and value is None:
            continue
        right = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not right or (number is int and not float(str(value)).is_integer()):
            kind = "an integer" if number is int else "a number"
            raise SearchSpaceError(f"space.{name}.{key} must be {kind}, got {value!r}.")
    low, high, step, log = given["low"], given["high"], given.get("step"), given.get("log", False)
    if not isinstance(log, bool):
        raise SearchSpaceError(f"space.{name}.log must be true or false, got {log!r}.")
    if low > high:
        raise SearchSpaceError(f"space.{name}: low {low!r} is above high {high!r}.")
    if step is not None and step <= 0:
        raise SearchSpaceError(f"space.{name}.step must be positive, got {step!r}.")
    if log and (step is not None or low <= 0):
        raise SearchSpaceError(f"space.{name}: log needs a positive low and no step.")
    if step is not None:  # Optuna would lower it, and say so at every trial
        high = low + step * int((high - low) / step + 1e-9)
    return Dimension(name, low=low, high=high, step=step, log=log, integer=number is int, when=when)


def _number(hint: Any) -> type | None:
    """Int or float where a type is one of them, or may be; else None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(get_origin(option) is Literal for option in options):
        return None
    return next((option for option in (int, float) if option in options), None)


def _conditions(name: str, given: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not given:
        raise SearchSpaceError(f"space.{name}.when must map settings to the values at which it is searched.")
    known = settings(ExperimentConfig)
    conditions = []
    for other, values in given.items():
        if other not in known:
            raise SearchSpaceError(f"space.{name}.when: {other} is not a setting.")
        try:
            allowed = tuple(coerce(known[other], v) for v in (values if isinstance(values, list) else [values]))
        except ConfigError as error:
            raise SearchSpaceError(f"space.{name}.when: {error}") from None
        conditions.append((other, allowed))
    return tuple(conditions)
