"""The settings as a tree: flatten, override, look up, check types, document.

Everything here is derived from the dataclasses in schema.py by introspection; nothing
about a particular setting is written in this module.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from math import inf
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from elman.errors import ConfigError

T = TypeVar("T")

LARGEST_INTEGER = 2**63 - 1
"""What the libraries below and the databases hold."""


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree: dotted name, type, default and description."""

    name: str
    type: Any
    default: Any
    help: str


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """The string literal below each field, on one line."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found


def _default(declared: Field[Any]) -> Any:
    if declared.default_factory is not MISSING:
        return declared.default_factory()
    return declared.default


def settings(cls: type, prefix: str = "") -> dict[str, Setting]:
    """Every setting below ``cls``, by dotted name, in the order of declaration."""
    return dict(_settings(cls, prefix))


@cache
def _settings(cls: type, prefix: str) -> dict[str, Setting]:
    hints = get_type_hints(cls)
    found: dict[str, Setting] = {}
    for declared in fields(cls):
        name, hint = prefix + declared.name, hints[declared.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            found |= settings(hint, f"{name}.")
        else:
            found[name] = Setting(name, hint, _default(declared), _docstrings(cls).get(declared.name, ""))
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, for every setting of a configuration."""
    flat: dict[str, Any] = {}
    for declared in fields(config):
        name, value = prefix + declared.name, getattr(config, declared.name)
        flat |= flatten(value, f"{name}.") if is_dataclass(value) else {name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of flattening a mapping: dotted names become nested mappings."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return tree


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name, ready to append to an error."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right leaf in the wrong section, or none at all
        leaf = name.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    return f" Did you mean {close[0]}?" if close else ""


def flatten_mapping(cls: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names of a nested (or already dotted) mapping; refuses what is no setting.

    Raises:
        ConfigError: A name is unknown, or a section holds no mapping.
    """
    known = settings(cls)
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    flat: dict[str, Any] = {}

    def visit(node: Mapping[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in sections:
                if value is None:  # an empty section in YAML
                    continue
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{name} must be a mapping of settings, got {value!r}.")
                visit(value, f"{name}.")
            elif name not in known:
                raise ConfigError(f"{name} is not a setting.{nearest(name, known)}")
            elif name in flat:
                raise ConfigError(f"{name} is given twice: keep one.")
            else:
                flat[name] = value

    visit(tree, "")
    return flat


def describe_type(hint: Any) -> str:
    """A type in the user's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each {describe_type(args[0])}"
        return f"a list of {len(args)}, each {describe_type(args[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return words.get(hint, str(hint))


class _MismatchError(Exception):
    pass


class _TooLargeError(Exception):
    pass


def _coerce(hint: Any, value: Any) -> Any:
    """The value in the setting's type, or _MismatchError. Nothing is converted but int to float and list to tuple."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _coerce(option, value)
            except _MismatchError:
                continue
        raise _MismatchError
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise _MismatchError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _MismatchError
        if args[-1] is Ellipsis:
            return tuple(_coerce(args[0], item) for item in value)
        if len(value) != len(args):
            raise _MismatchError
        return tuple(_coerce(a, item) for a, item in zip(args, value, strict=True))
    if hint is types.NoneType:
        if value is None:
            return None
        raise _MismatchError
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else inf if value > 0 else -inf
    if hint is int and type(value) is int and abs(value) > LARGEST_INTEGER:
        raise _TooLargeError
    # bool is an int to isinstance, never to a user
    if type(value) is hint:
        return value
    raise _MismatchError


def coerce(setting: Setting, value: Any) -> Any:
    """Check a value against the setting's type.

    Raises:
        ConfigError: The value is of another type; "12" is no integer, and neither is true.
    """
    try:
        return _coerce(setting.type, value)
    except _MismatchError:
        raise ConfigError(f"{setting.name} must be {describe_type(setting.type)}, got {value!r}.") from None
    except _TooLargeError:
        raise ConfigError(f"{setting.name} must be at most {LARGEST_INTEGER}, got an integer beyond it.") from None


def build(cls: type[T], flat: Mapping[str, Any]) -> T:
    """The configuration with these dotted settings; the rest keep their defaults.

    Raises:
        ConfigError: A name, a type, a range or a combination is refused.
    """
    known = settings(cls)
    for name in flat:
        if name not in known:
            raise ConfigError(f"{name} is not a setting.{nearest(name, known)}")
    checked = {name: coerce(known[name], value) for name, value in flat.items()}
    return _construct(cls, checked, "")


def _construct(cls: type[T], flat: Mapping[str, Any], prefix: str) -> T:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for declared in fields(cls):  # type: ignore[arg-type]  # a dataclass type, which T cannot say
        name = prefix + declared.name
        if is_dataclass(hints[declared.name]):
            arguments[declared.name] = _construct(hints[declared.name], flat, f"{name}.")
        elif name in flat:
            arguments[declared.name] = flat[name]
    return cls(**arguments)


def override(config: T, changes: Mapping[str, Any]) -> T:
    """The same configuration with some dotted settings changed, checked as if read anew."""
    known = settings(type(config))
    merged = flatten(config)
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f"{name} is not a setting.{nearest(name, known)}")
        merged[name] = value
    return build(type(config), merged)


def differences(config: Any) -> dict[str, Any]:
    """Dotted settings that differ from their defaults."""
    known = settings(type(config))
    return {name: value for name, value in flatten(config).items() if value != known[name].default}


def signature(config: Any) -> str:
    """Twelve hexadecimal digits that two configurations share when they train the same model.

    The name, where a run is tracked and when its state is written change nothing that is trained:
    they are left out.
    """
    ignored = ("tracking.", "trainer.checkpoint_")
    flat = {n: v for n, v in flatten(config).items() if n != "name" and not n.startswith(ignored)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def settings_table(cls: type) -> str:
    """Markdown table of every setting, for the README."""
    lines = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for setting in settings(cls).values():
        default = json.dumps(setting.default, ensure_ascii=False)
        lines.append(f"| `{setting.name}` | `{default}` | {setting.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


