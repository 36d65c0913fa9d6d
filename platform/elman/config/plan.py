"""A search file, read: what to vary around which experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elman.config.load import read_settings, read_yaml
from elman.config.schema import ExperimentConfig
from elman.config.search import SearchConfig
from elman.config.tree import build, coerce, flatten, flatten_mapping, nearest, settings
from elman.errors import ConfigError, SearchSpaceError


@dataclass(frozen=True)
class SearchPlan:
    """A search file, read: what to vary around which experiment.

    Attributes:
        source: The file, for messages.
        base: The experiment that every trial starts from.
        config: Study, workers, ceilings.
        space: Dotted setting → its bounds or choices, as the file has them.
        enqueue: Known good points, dotted setting → value; tried first.
    """

    source: str
    base: ExperimentConfig
    config: SearchConfig
    space: dict[str, Any]
    enqueue: tuple[dict[str, Any], ...] = ()


KEYS = ("base", "settings", "study", "search", "constraints", "space", "enqueue")
"""What a search file holds at its top: ``settings`` changes the base experiment for every trial alike."""


def load_plan(path: str | Path, flags: Mapping[str, Any] | None = None) -> SearchPlan:
    """The plan that a search file and flags make.

    Args:
        path: Of the file; paths in it are relative to its folder.
        flags: Dotted settings of the search or of the experiment; they win.

    Raises:
        ConfigError: A setting is refused; the line names the file or the flag.
        SearchSpaceError: There is no space, or an enqueued point lies outside it.
    """
    with naming(path, flags or {}):
        return _plan(path, read_yaml(path), dict(flags or {}))


@contextmanager
def naming(path: str | Path, flags: Mapping[str, Any]) -> Iterator[None]:
    """Put the file's name before an error about a setting, unless a flag gave it or it stands there already."""
    try:
        yield
    except ConfigError as error:
        own = str(error).startswith(str(path)) or any(str(error).startswith(name) for name in flags)
        raise ConfigError(str(error) if own else f"{path}: {error}") from None


def _plan(path: str | Path, tree: Mapping[str, Any], given: Mapping[str, Any]) -> SearchPlan:
    check_keys(path, tree, KEYS, "a search file")
    own = {name: value for name, value in given.items() if name in settings(SearchConfig)}
    changes = {name: value for name, value in given.items() if name not in own}
    sections = {key: section(path, tree, key) for key in ("study", "search", "constraints")}
    flat = flatten_mapping(SearchConfig, sections)
    if "study.name" not in flat and "study.name" not in own:
        flat["study.name"] = Path(path).stem
    study = flat | own
    bounded = any(study.get(f"study.{name}") is not None for name in ("trials", "minutes"))
    if study.get("study.sampler") != "grid" and not bounded:
        flat["study.trials"] = 20
        own.pop("study.trials", None)
    base: dict[str, Any] = {}
    if tree.get("base") is not None:
        base = read_settings(ExperimentConfig, _beside(path, tree["base"], "base"))
    base |= flatten_mapping(ExperimentConfig, section(path, tree, "settings"))
    return SearchPlan(
        source=str(path),
        base=build(ExperimentConfig, base | changes),
        config=build(SearchConfig, flat | own),
        space=flat_space(path, tree.get("space")),
        enqueue=_enqueued(path, tree),
    )


def _beside(path: str | Path, value: Any, key: str) -> Path:
    if not isinstance(value, str):
        raise SearchSpaceError(f"{path}: {key} must be the path of an experiment file, got {value!r}.")
    return Path(path).parent / value


def check_keys(path: str | Path, tree: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Refuse a key at a file's top that does not belong there.

    Raises:
        SearchSpaceError: There is one.
    """
    for key in tree:
        if key not in known:
            raise SearchSpaceError(f"{path}: {key} is not part of {kind}.{nearest(str(key), known)}")


def section(path: str | Path, tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping under a key of a file; empty where there is none.

    Raises:
        SearchSpaceError: Something else is there.
    """
    value = tree.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise SearchSpaceError(f"{path}: {key} must be a mapping of settings, got {value!r}.")
    return value or {}


def flat_space(path: str | Path, given: Any) -> dict[str, Any]:
    """Dotted setting → bounds or choices, of a file's space.

    Raises:
        SearchSpaceError: It is none, or it names what is no setting.
    """
    if not isinstance(given, Mapping) or not given:
        raise SearchSpaceError(f"{path}: space must map settings to their bounds or choices, got {given!r}.")
    known = settings(ExperimentConfig)
    flat: dict[str, Any] = {}

    def visit(node: Mapping[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in known:
                if name in flat:
                    raise SearchSpaceError(f"{path}: space.{name} is given twice.")
                flat[name] = value
            elif isinstance(value, Mapping) and any(k.startswith(f"{name}.") for k in known):
                visit(value, f"{name}.")
            else:
                raise SearchSpaceError(f"{path}: space.{name} is not a setting.{nearest(name, known)}")

    visit(given, "")
    return flat


def _enqueued(path: str | Path, tree: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Points given in place, or as experiment files whose settings in the space are the point."""
    given = tree.get("enqueue") or []
    if not isinstance(given, list):
        raise SearchSpaceError(f"{path}: enqueue must be a list of points, got {given!r}.")
    space, known = flat_space(path, tree.get("space")), settings(ExperimentConfig)
    points = []
    for index, entry in enumerate(given, 1):
        if isinstance(entry, str):
            file = _beside(path, entry, f"enqueue, entry {index}")
            whole = flatten(build(ExperimentConfig, read_settings(ExperimentConfig, file)))
            points.append({name: whole[name] for name in space})
            continue
        if not isinstance(entry, Mapping):
            raise SearchSpaceError(
                f"{path}: enqueue, entry {index}, must be a point or the path of an experiment file, got {entry!r}."
            )
        point = flatten_mapping(ExperimentConfig, entry)
        for name, value in point.items():
            if name not in space:
                raise SearchSpaceError(f"{path}: enqueue, entry {index}: {name} is not in the space.")
            coerce(known[name], value)
        points.append(point)
    return tuple(points)
