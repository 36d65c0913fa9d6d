"""Where a study is kept: Optuna's storages, opened once, and patient where they are away for a while.

Only the driver of a study speaks to its storage (and the agents of other machines, to the
trials that the driver gave them): what Optuna allows many processes to do at once is
where it loses count.
"""

from __future__ import annotations

import fcntl
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from elman.errors import TrackingError, without_password
from elman.tracking.absence import first_line
from elman.tracking.local import local_root, refuse_full_disk

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""A storage that is away for longer ends the search; the same command goes on with it."""

WAIT_SECONDS = 1.0

_ANSWERS = (KeyError, ValueError, TypeError, NotImplementedError, RuntimeError)
"""What a storage raises where it understood the question; anything else is its absence."""


def default_storage() -> str:
    """Sqlite beside the tracking store."""
    return f"sqlite:///{local_root() / 'search.db'}"


def open_storage(url: str | None, note: Callable[[str], None] | None = None) -> BaseStorage:
    """A storage that waits and tries again where its server is away for a while.

    Args:
        url: A database URL, journal:PATH or grpc://HOST:PORT; None takes ``default_storage()``.
        note: Told, once each time, that the storage is away and that it is back.

    Raises:
        TrackingError: The URL is not of such a kind, or nothing answers there now.
    """
    url = url or default_storage()
    # What it migrates and retries is no news; what fails is said once, by us.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    if not re.match(r"((sqlite|postgresql|mysql)(\+\w+)?|grpc)://|journal:", url):
        raise TrackingError(
            f"search.storage {without_password(url)} is no storage: give sqlite:///PATH, postgresql://…, mysql://…, "
            "journal:PATH or grpc://HOST:PORT."
        )
    if url == default_storage():
        refuse_full_disk()
    try:
        with _schema_lock(url):
            inner = _open(url, note or log.warning)
    except TrackingError:
        raise
    except Exception as error:  # of sqlalchemy, its drivers, grpc or the operating system
        raise TrackingError(
            f"search.storage {without_password(url)} cannot be used ({first_line(error)[:200]}): "
            "start its server, or name another storage."
        ) from None
    return patient(inner, note or log.warning)


def _open(url: str, note: Callable[[str], None]) -> BaseStorage:
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_journal(path, note)
        return JournalStorage(JournalFileBackend(str(path)))
    if url.startswith("grpc://"):
        return _open_proxy(url)
    url = re.sub(r"^postgresql://", "postgresql+psycopg://", url)
    url = re.sub(r"^mysql://", "mysql+pymysql://", url)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # A connection that died while the server restarted is found out before it is used.
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    arguments["connect_args"] = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10}
    return get_storage(RDBStorage(url, engine_kwargs=arguments))


def _open_proxy(url: str) -> BaseStorage:
    import warnings

    from optuna.storages import GrpcStorageProxy

    host, _, port = url.removeprefix("grpc://").partition(":")
    if not host or not port.isdigit():
        raise TrackingError(f"search.storage {url} is no proxy's address: give grpc://HOST:PORT.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = GrpcStorageProxy(host=host, port=int(port))
    proxy.wait_server_ready(timeout=5)
    return proxy


@contextmanager
def _schema_lock(url: str) -> Iterator[None]:
    """Two processes that make a database's tables at once crash each other."""
    if url.startswith("grpc://"):
        with nullcontext():
            yield
        return
    local_root().mkdir(parents=True, exist_ok=True)
    with (local_root() / ".search.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_JOURNAL = b'{"op_code"'


def _mend_journal(path: Path, note: Callable[[str], None]) -> None:
    """Cut off what a killed writer left of its last line: Optuna reads no further than that."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        content = file.read()
        if content[: len(_JOURNAL)] != _JOURNAL[: len(content)]:  # a text of the user's must stay whole
            raise TrackingError(f"search.storage journal:{path} is no journal of Optuna: name another file.")
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            note(f"{path}: its last line was torn by a killed writer, and is cut off")
            file.truncate(whole)


def patient(inner: BaseStorage, note: Callable[[str], None]) -> BaseStorage:
    """The storage with every call tried again, for up to ten minutes, while nobody answers."""

    def tried(name: str) -> Callable[..., Any]:
        method = getattr(inner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            begun: float | None = None
            while True:
                try:
                    answer = method(*arguments, **named)
                except _ANSWERS:
                    raise
                except optuna.exceptions.OptunaError as error:
                    if not isinstance(error, optuna.exceptions.StorageInternalError):
                        raise
                    begun = _wait(begun, error, note)
                except Exception as error:
                    begun = _wait(begun, error, note)
                else:
                    if begun is not None:
                        note("the study's storage answers again")
                    return answer

        return call

    names = [name for name in dir(BaseStorage) if not name.startswith("_") and callable(getattr(BaseStorage, name))]
    # Optuna asks for a BaseStorage, whose abstract methods must stand in the class.
    methods: dict[str, Any] = {name: staticmethod(tried(name)) for name in names}
    return type("PatientStorage", (BaseStorage,), {**methods, "inner": inner})()  # type: ignore[no-any-return]


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a storage that ``open_storage`` opened."""
    inner = getattr(storage, "inner", storage)
    backend = getattr(inner, "_backend", inner)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif hasattr(backend, "close"):
        backend.close()


def _wait(begun: float | None, error: Exception, note: Callable[[str], None]) -> float:
    if begun is None:
        note(f"the study's storage does not answer; waiting ({first_line(error)[:200]})")
        begun = time.monotonic()
    if time.monotonic() - begun > PATIENCE_SECONDS:
        raise TrackingError(
            f"search.storage did not answer for {PATIENCE_SECONDS / 60:.0f} minutes ({first_line(error)[:200]}): "
            "once it is back, the same command goes on with the study."
        ) from None
    time.sleep(WAIT_SECONDS)
    return begun
