"""Errors that carry one line for the user.

Every mistake a user can make ends as an ElmanError; the command line prints its
message and exits with code 2. Anything else is a failure of ours.
"""


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


class SearchFailedError(Exception):
    """A search that came to no answer.

    Not the user's slip but the trials' outcome: the exit code is 1.
    """
