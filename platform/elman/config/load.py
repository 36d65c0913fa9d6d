"""From files and flags to a configuration.

Precedence: defaults < YAML < flags. YAML is read with a loader that constructs plain
values only: no tags, no aliases (a few lines of them can stand for gigabytes), no
repeated keys. The flags are parsed by jsonargparse, whose only home is this module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from elman.config.schema import ExperimentConfig
from elman.config.tree import (
    build,
    coerce,
    describe_type,
    flatten,
    flatten_mapping,
    nearest,
    nest,
    settings,
)
from elman.errors import ConfigError

T = TypeVar("T")

LARGEST_FILE = 64_000
"""Bytes; a configuration is a page, and anything larger was given by mistake."""


class _PlainLoader(yaml.SafeLoader):
    """Scalars, lists and mappings, nothing else."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]  # yaml's stubs
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for text; everyone who writes a learning rate means a number.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: The file is missing, unreadable, too large, no YAML or no mapping; one line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)  # a device has no size, and no end
    except (OSError, ValueError) as error:  # the latter of a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({why}): give a YAML file of settings.") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path} is larger than {LARGEST_FILE:,} bytes: is it a configuration?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a UTF-8 text: give a YAML file of settings.") from None
    try:
        tree = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or 'not YAML'}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(tree).__name__}.")
    return tree


def read_settings(cls: type, path: str | Path) -> dict[str, Any]:
    """Dotted settings of a YAML file, each of its type.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or of another type; the line names the file.
    """
    try:
        flat = flatten_mapping(cls, read_yaml(path))
        known = settings(cls)
        return {name: coerce(known[name], value) for name, value in flat.items()}
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def load_config(cls: type[T], path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> T:
    """The configuration that a file and flags (dotted name → value) make.

    Raises:
        ConfigError: Anything is refused; the line names the file or the flag.
    """
    from_file = {} if path is None else read_settings(cls, path)
    merged = from_file | dict(flags or {})
    try:
        return build(cls, merged)
    except ConfigError as error:
        overridden = any(str(error).startswith(name) for name in flags or {})
        raise ConfigError(str(error) if overridden or path is None else f"{path}: {error}") from None


def dump_yaml(config: Any) -> str:
    """The whole configuration as YAML that load_config reads back to an equal one."""
    return yaml.safe_dump(nest(flatten(config)), sort_keys=False, allow_unicode=True, default_flow_style=False)


def from_flat(flat: Mapping[str, Any]) -> ExperimentConfig:
    """An experiment from dotted settings, as a checkpoint or MLflow holds them."""
    return build(ExperimentConfig, flat)


class Flags:
    """A command's flags, parsed by jsonargparse.

    Args:
        command: What the usage line calls the command.
        description: One sentence.
    """

    def __init__(self, command: str, description: str) -> None:
        from jsonargparse import ArgumentParser

        class Parser(ArgumentParser):
            def error(self, message: str, ex: Exception | None = None) -> NoReturn:
                raise ConfigError(message)

        self.parser = Parser(prog=f"elman {command}", description=description, exit_on_error=False, add_help=False)
        self.parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        self.known: dict[str, Any] = {}
        self._positional: list[str] = []
        self._sections: dict[str, Any] = {}

    def add_positional(self, name: str, help_text: str, *, nargs: str | None = None) -> None:
        """A positional argument; ``nargs`` as in argparse."""
        options: dict[str, Any] = {"nargs": nargs} if nargs else {}
        self.parser.add_argument(name, help=help_text, **options)
        self._positional.append(name)

    def add_option(self, name: str, hint: Any, help_text: str, default: Any = None) -> None:
        """An option of the command itself, ``--name``."""
        if hint is bool:
            self.parser.add_argument(f"--{name}", action="store_true", help=help_text)
        else:
            self.parser.add_argument(f"--{name}", type=hint, default=default, help=help_text)
        self.known[name] = hint

    def add_settings(
        self, cls: type, *, only: Sequence[str] = (), prefix: str = "", leaves: Sequence[str] = ()
    ) -> None:
        """A flag for every setting of a dataclass (or of the named sections or leaves alone), its name prefixed."""
        for setting in settings(cls, prefix).values():
            section = setting.name.rpartition(".")[0]
            if (only and section not in only) or (leaves and setting.name.rpartition(".")[2] not in leaves):
                continue
            if section not in self._sections:
                title = section or ("experiment" if "corpus.name" in settings(cls) else "settings")
                self._sections[section] = self.parser.add_argument_group(title)
            self._sections[section].add_argument(
                f"--{setting.name}", type=setting.type, default=setting.default, help=setting.help.replace("%", "%%")
            )
            self.known[setting.name] = setting.type

    def build(self, cls: type[T], given: Mapping[str, Any], *, prefix: str = "") -> T:
        """The dataclass with the settings that the command line gave it.

        Raises:
            ConfigError: A value or a combination is refused.
        """
        names = settings(cls)
        chosen = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        try:
            return build(cls, {key: value for key, value in chosen.items() if key in names})
        except ConfigError as error:
            message = str(error)
            raise ConfigError(f"--{prefix}{message}" if message.split()[0] in names else message) from None

    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every value by name, and those alone that the command line gave.

        Raises:
            ConfigError: A flag is unknown, or its value of the wrong type.
        """
        import argparse

        given = {a[2:].split("=", 1)[0] for a in arguments if a.startswith("--")}
        for name in given - {"", "help"}:
            if name not in self.known:
                hint = nearest(name, self.known)
                raise ConfigError(f"--{name} is not a flag of {self.parser.prog}.{hint.replace('mean ', 'mean --')}")
        try:
            namespace = self.parser.parse_args(list(arguments))
        except (argparse.ArgumentError, ConfigError) as error:
            raise ConfigError(self._one_line(str(error))) from None
        except OverflowError:  # an integer that no float holds: jsonargparse lets it through
            flag, limit = self._overflowing(list(arguments)), f"{sys.float_info.max:.1e}"
            raise ConfigError(f"{flag} must be at most {limit} in size, got more.") from None
        values = {name: namespace[name.replace('-', '_')] for name in [*self.known, *self._positional]}
        return values, {name: values[name] for name in given if name in values}

    def _overflowing(self, arguments: list[str]) -> str:
        """The flag whose value no float holds: the last one of the shortest beginning that overflows."""
        import argparse

        for end in range(1, len(arguments)):
            try:
                self.parser.parse_args(arguments[:end])
            except OverflowError:
                arguments = arguments[:end]
                break
            except (argparse.ArgumentError, ConfigError):  # a flag that still lacks its value
                continue
        return next(word.split("=", 1)[0] for word in reversed(arguments) if word.startswith("--"))

    def _one_line(self, message: str) -> str:
        key = re.search(r'Parser key "([^"]+)"', message)
        if key and key[1] in self.known:
            got = re.search(r"(?:Got value|Given value): (.*)", message)
            value = f", got {got[1]}" if got else ""
            return f"--{key[1]} must be {describe_type(self.known[key[1]])}{value}."
        return f"{message.splitlines()[0].strip()}: `{self.parser.prog} --help` tells what it takes."
