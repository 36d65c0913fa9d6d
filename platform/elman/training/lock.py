"""A run's folder of checkpoints, and who may write there: one process at a time.

The lock is the kernel's, and goes with its process however that ends. So a run that is
RUNNING with nobody holding its lock was interrupted; and so was one that came no further
than its outbox, whose lock is the kernel's too.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from elman.errors import TrackingError
from elman.tracking.local import RunSummary, checkpoint_root, opened, outbox_root

PATIENCE_SECONDS = 0.3
"""A look at the lock holds it for a moment."""


def checkpoint_folder(run_id: str) -> Path:
    """Where a run's checkpoints are while it trains."""
    return checkpoint_root() / run_id


def is_interrupted(run: RunSummary) -> bool:
    """Whether a run that counts as RUNNING trained on this machine and has no process any more."""
    if run.status != "RUNNING" or not run.is_experiment:
        return False
    try:
        with (run.checkpoints / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        outbox = outbox_root() / run.mark
        if not outbox.exists():
            return False  # a run of another machine
        with opened(outbox) as found:
            if found is None:
                return False  # its process has it open
            return not found.has("end")  # ended, and only the store does not know yet
    except OSError:
        return False  # it is held
    return True


class FolderLock:
    """Holds a run's folder, which it makes where there is none.

    Raises:
        TrackingError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "lock"
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    self._file = file
                    break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip()
                    file.close()
                    raise TrackingError(
                        f"Run {self._folder.name} is being trained by another process ({holder or 'just begun'}): "
                        "wait for its end, or end it."
                    ) from None
            file.close()  # held, or removed by a run that ended while we opened it
            time.sleep(PATIENCE_SECONDS / 10)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
