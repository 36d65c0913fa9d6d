"""Findings: what a check of ``elman doctor`` came to, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec

P = ParamSpec("P")

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Outcome:
    """A check's result, before it has the check's name.

    Attributes:
        status: A warning leaves everything usable; a failure does not.
        line: What was found, with its figures.
        remedy: What to do about it; empty where nothing need be done.
    """

    status: Status
    line: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """An outcome, and which check it is of."""

    name: str
    status: Status
    line: str
    remedy: str = ""


def ok(line: str) -> Outcome:
    """All is well."""
    return Outcome("ok", line)


def warning(line: str, remedy: str) -> Outcome:
    """Something is worth knowing, and everything works."""
    return Outcome("warning", line, remedy)


def failure(line: str, remedy: str) -> Outcome:
    """Something is wrong."""
    return Outcome("failure", line, remedy)


def check(name: str) -> Callable[[Callable[P, Outcome]], Callable[P, Finding]]:
    """Make a finding of what a function comes to; what it raises is a failure too.

    Args:
        name: The check's; ``{0}`` in it is the function's first argument.
    """

    def decorate(function: Callable[P, Outcome]) -> Callable[P, Finding]:
        @wraps(function)
        def examine(*arguments: P.args, **named: P.kwargs) -> Finding:
            try:
                outcome = function(*arguments, **named)
            except Exception as error:  # a broken model may raise anything, and the other checks still tell something
                said = " ".join(str(error).split())[:200]
                outcome = failure(f"could not be checked: {type(error).__name__}: {said}", "mend what raises this.")
            return Finding(name.format(*arguments), outcome.status, outcome.line, outcome.remedy)

        return examine

    return decorate
