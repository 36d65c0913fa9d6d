"""Errors that carry one line for the user.

Every mistake a user can make ends as an ElmanError; the command line prints its
message and exits with code 2. Anything else is a failure of ours.
"""

import re

LONGEST_LINE = 1000
"""Characters of a message; what a file holds, or an attacker named it, may be of any length."""


def without_password(text: str) -> str:
    """A text whose addresses are fit to be shown: what stands before the host's @ is cut."""
    return re.sub(r"(://)[^/\s'\"]*@", r"\1***@", text)


def one_line(message: str) -> str:
    """A message fit for a terminal: one line, no password, no control or invisible characters, not too long."""
    words = without_password(" ".join(message.split()))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    half = LONGEST_LINE // 2
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:half]} … {shown[-half:]}"


class ElmanError(Exception):
    """A mistake the user can mend; the message names what, its value and the remedy."""


class ConfigError(ElmanError):
    """A setting is unknown, out of range, of the wrong type, or contradicts another."""


class DataError(ElmanError):
    """A corpus, a prompt or a file cannot be used as it is."""


class ModelError(ElmanError):
    """A model, checkpoint or run cannot be found or does not fit."""


class SearchSpaceError(ElmanError):
    """A search space names no setting, or bounds that the schema refuses."""


class TrackingError(ElmanError):
    """The tracking store cannot be reached or written."""


class DivergenceError(Exception):
    """The loss became NaN or infinite.

    Not the user's slip but the training's outcome: the run is FAILED and the exit code 1.
    """


class UnusableCheckpointsError(Exception):
    """Every checkpoint that a run could go on from is damaged.

    Nobody's slip, and starting from zero without a word would be worse: the exit code is 1.
    """


class SearchFailedError(Exception):
    """A search that came to no answer.

    Not the user's slip but the trials' outcome: the exit code is 1.
    """
