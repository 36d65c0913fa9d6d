"""A tracking store that is away: how it is told from one that refuses, how it is waited for, how it is named.

Nothing here knows where a store is, so that whoever delivers to one and whoever opens one say the same.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from elman.errors import TrackingError, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


class StoreAwayError(TrackingError):
    """Nobody answers where the tracking store should be.

    Attributes:
        reason: In a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_absence(error: Exception) -> bool:
    """Whether nobody answered, rather than that the answer was no."""
    from mlflow.exceptions import MlflowException

    text = str(error)
    if "authentication failed" in text:
        return False
    if isinstance(error, MlflowException):
        if error.error_code in ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"):
            return True
        return error.error_code == "INTERNAL_ERROR" and any(
            sign in text for sign in ("OperationalError", "API request to", "Connection refused", "server closed")
        )
    kind = type(error)
    return (
        isinstance(error, ConnectionError | json.JSONDecodeError)
        or kind.__module__.split(".")[0] in ("requests", "urllib3")
        or kind.__name__ == "OperationalError"
    )


class PatientClient:
    """An MlflowClient whose calls wait for a store that is away for a while.

    Args:
        client: The real one.
        seconds: After which its absence is an error.
    """

    def __init__(self, client: MlflowClient, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def call(*arguments: Any, **named: Any) -> Any:
            deadline = time.monotonic() + self._seconds
            while True:
                try:
                    return method(*arguments, **named)
                except Exception as error:  # of MLflow, its databases' drivers, or the network
                    if not is_absence(error) or time.monotonic() > deadline:
                        raise
                    log.info("The tracking store does not answer; waiting (%s).", first_line(error))
                    time.sleep(1.0)

        return call


class Call:
    """A function that runs in a thread of its own, so that nobody need wait for it.

    Args:
        function: What to call.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._answer: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._function()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float | None) -> Any:
        """Its answer.

        Raises:
            TimeoutError: It has not come back within so many seconds.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"no answer within {round(seconds or 0, 1):g} s")
        if self._error is not None:
            raise self._error
        return self._answer

    def late(self) -> Any:
        """Its answer, whenever it comes; None where it failed."""
        with suppress(Exception):
            return self.result(None)
        return None


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns.

    Raises:
        TimeoutError: It takes longer; it goes on by itself.
    """
    return Call(function).result(seconds)


def first_line(error: BaseException) -> str:
    """What an error says, fit to be shown in a line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_password(line)[:500]


def in_short(error: BaseException) -> str:
    """Why a store did not do what it was asked, in a few words where they are known."""
    text = str(error)
    for sign, words in _IN_SHORT.items():
        if sign in text:
            return words
    return first_line(error)[:200]


_IN_SHORT = {
    "Connection refused": "connection refused",
    "timed out": "no answer in time",
    "Remote end closed": "it closes the connection",
    "Connection aborted": "it closes the connection",
    "Connection reset": "it closes the connection",
    "too many 5": "it answers with errors",
    "failed with error code 5": "it answers with errors",
    "Name or service not known": "there is no such host",
    "database is locked": "another process writes",
}
