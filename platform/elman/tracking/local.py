"""What this machine knows of runs: the local store, and the folders of runs that were trained here.

A run whose process is gone left its outbox, which knows how it began. So it is found, and gone on
with, while the store that has it is away.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elman.errors import TrackingError
from elman.tracking.outbox import Outbox
from elman.tracking.sender import MARK

LOCAL_ROOT = "mlruns"


def local_root() -> Path:
    """The folder of the local store, absolute: MLflow stores locations as they are given."""
    return Path(LOCAL_ROOT).absolute()


LEAST_ROOM = 1 << 20
"""Bytes on the disk without which no run begins: it could not even be recorded that there is one."""


def refuse_full_disk() -> None:
    """Refuse to begin what could not be recorded.

    Raises:
        TrackingError: The disk of the local store is full.
    """
    root = local_root()
    if root.is_dir() and shutil.disk_usage(root).free < LEAST_ROOM:
        raise TrackingError(f"{root} cannot be written (the disk is full): make room, or run elsewhere.")


def outbox_root() -> Path:
    """Where the outboxes of runs are."""
    return local_root() / "outbox"


def checkpoint_root() -> Path:
    """Where the checkpoints of runs are while they train."""
    return local_root() / "checkpoints"


def local_uri() -> str:
    """The local store's."""
    return f"sqlite:///{local_root() / 'mlflow.db'}"


@dataclass(frozen=True)
class RunSummary:
    """A run as the store has it."""

    id: str
    name: str
    experiment: str
    status: str
    started: int
    """Milliseconds since 1970."""
    ended: int | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def mark(self) -> str:
        """What it was called before the store gave it an id; its outbox is still."""
        return self.tags.get(MARK, self.id)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are while it trains: under its mark if the store was away when it began."""
        marked = checkpoint_root() / self.mark
        return marked if marked.exists() else checkpoint_root() / self.id

    @property
    def is_unheard(self) -> bool:
        """Whether no store is known to have it."""
        return MARK in self.tags and self.id == self.mark

    @property
    def is_experiment(self) -> bool:
        """Whether it is a training of its own: no study, and no trial of one."""
        return "config.signature" in self.tags and "trial.number" not in self.tags


def outboxes() -> list[Path]:
    """Folders of runs that have an outbox, the oldest first."""
    root = outbox_root()
    found = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime)


@contextmanager
def opened(folder: Path, *, tidy: bool = False) -> Iterator[Outbox | None]:
    """A run's outbox, closed afterwards; None where another process has it open.

    Args:
        folder: The run's.
        tidy: Whether one of a run that has ended goes where nothing in it waits.
    """
    try:
        outbox = Outbox(folder)
    except TrackingError:
        yield None
        return
    try:
        yield outbox
    finally:
        outbox.close(ended=tidy and outbox.has("end"))


def local_runs() -> list[RunSummary]:
    """Runs that left an outbox and have no process, the newest first, as far as this machine knows them."""
    found = []
    for folder in outboxes():
        with opened(folder) as outbox:
            if outbox is None:
                continue
            run = _summary(outbox)
        if run is not None:
            found.append(run)
    return sorted(found, key=lambda run: run.started, reverse=True)


def find_local(reference: str) -> RunSummary | None:
    """One of them, by its id, the first eight or more digits of it, or its name, of which the newest."""
    for run in local_runs():
        ids = (run.id, run.mark)
        if reference in (*ids, run.name) or (len(reference) > 7 and any(one.startswith(reference) for one in ids)):
            return run
    return None


def local_file(run: RunSummary, name: str) -> bytes | None:
    """A small file of a run that waits in its outbox; None where there is none."""
    folder = outbox_root() / run.mark
    if not folder.exists():
        return None
    with opened(folder) as outbox:
        return None if outbox is None else outbox.file(name)


def _summary(outbox: Outbox) -> RunSummary | None:
    born, ends = outbox.fact("born"), outbox.contents("end")
    if born is None:
        return None
    return RunSummary(
        id=str(outbox.fact("run") or born["mark"]),
        name=born["name"],
        experiment=outbox.fact("store")["experiment"],
        status=ends["end"]["status"] if ends else "RUNNING",
        started=born["started"],
        ended=ends["end"]["at"] if ends else None,
        params=outbox.contents("param"),
        metrics=outbox.newest(),
        tags={**born["tags"], **outbox.contents("tag"), MARK: born["mark"]},
    )
