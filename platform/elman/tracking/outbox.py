"""What a run logs, kept on disk until the tracking store has it.

A folder a run, ``mlruns/outbox/MARK``: a SQLite file with every metric and record, and the
files that wait to be uploaded. One process at a time has it open; SQLite's own lock says
so, and goes with the process however that ends.

A metric has one value at a step: the first one stands. So a training that does steps
again, because it was killed after they were logged, logs nothing twice.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from elman.errors import TrackingError

log = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
"""Most that a kill can take of the metrics; the steps since the last checkpoint are done again anyway."""

INLINE_BYTES = 1 << 20
"""Files up to this size are kept inside the database."""

RETURN_SECONDS = 30.0
"""Between two attempts to go back to a disk that was full."""

LARGEST_FLOAT = 1.7976931348623157e308

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS metrics (
    number INTEGER PRIMARY KEY, key TEXT, step INTEGER, value REAL, timestamp INTEGER, state INTEGER DEFAULT 0,
    UNIQUE (key, step)
);
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, name TEXT, content TEXT, data BLOB,
    state INTEGER DEFAULT 0, result TEXT, UNIQUE (kind, name)
);
CREATE INDEX IF NOT EXISTS waiting_metrics ON metrics (number) WHERE state = 0;
CREATE INDEX IF NOT EXISTS waiting_records ON records (number) WHERE state = 0;
"""
WAITS, DELIVERED, REFUSED = 0, 1, 2

DATABASE = "outbox.db"


class Row(NamedTuple):
    """A metric's value at a step; ``timestamp`` is in milliseconds since 1970."""

    number: int
    key: str
    value: float
    timestamp: int
    step: int


class Record(NamedTuple):
    """Anything else that is logged, in the order in which it was."""

    number: int
    kind: str
    name: str
    content: Any
    data: bytes | None


class Outbox:
    """A run's outbox, opened; made where there is none.

    Where the disk is full it goes on in memory, says so once, and returns to the disk when it can. A damaged
    database is set aside, and what can be read of it taken over.

    Args:
        folder: The run's.
        patience: Seconds for which another process may have it open.

    Raises:
        TrackingError: Another process has it open.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        self.folder = folder
        self._pending: list[tuple[str, int, float, int]] = []
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._in_memory_since: float | None = None
        self._volatile: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = self._open(patience)
        except (OSError, sqlite3.OperationalError) as error:
            if "locked" in str(error):
                raise TrackingError(
                    f"The outbox of run {folder.name} is in use by another process: wait for its end."
                ) from None
            self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            self._db.executescript(SCHEMA)
            self._say_full(error)
        self._writer = threading.Thread(target=self._write_on, name="outbox", daemon=True)
        self._writer.start()

    def _open(self, patience: float) -> sqlite3.Connection:
        try:
            return self._connect(patience)
        except sqlite3.OperationalError:  # locked, or the disk is full
            raise
        except sqlite3.DatabaseError as error:
            aside = _set_aside(self.folder)
            db = self._connect(patience)
            log.warning(
                "warning: %s is damaged (%s): set aside as %s; %d records could be read, what else waited is lost.",
                self.folder / DATABASE, error, aside.name, _rescue(aside, db),
            )  # fmt: skip
            return db

    def _connect(self, patience: float) -> sqlite3.Connection:
        db = sqlite3.connect(self.folder / DATABASE, timeout=patience, check_same_thread=False, isolation_level=None)
        try:
            # The lock is held until the end, which also spares a file shared between processes.
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(SCHEMA)
            [verdict] = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(" ".join(verdict.split()))
        except BaseException:
            db.close()
            raise
        return db

    # What is logged ----------------------------------------------------------------------

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics at a step; returns at once."""
        now = int(time.time() * 1000)
        rows = [(key, step, _storable(value), now) for key, value in metrics.items()]
        with self._lock:
            self._pending.extend(rows)

    def put(self, kind: str, name: str, content: Any = None, data: bytes | None = None) -> None:
        """Note a record; one of the same kind and name is replaced."""
        with self._lock:
            self._write("DELETE FROM records WHERE kind = ? AND name = ?", [(kind, name)])
            values = [(kind, name, json.dumps(content), data)]
            self._write("INSERT INTO records (kind, name, content, data) VALUES (?, ?, ?, ?)", values)

    def put_file(self, path: Path, folder: str | None) -> bool:
        """Note a file as artifact; returns whether it will still be there when ``path`` is gone."""
        name = f"{folder}/{path.name}" if folder else path.name
        if path.stat().st_size <= INLINE_BYTES:
            self.put("file", name, None, path.read_bytes())
            return self._in_memory_since is None
        try:
            place = self._new_place() / path.name
            try:
                os.link(path, place)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, place)
        except OSError as error:
            self._say_full(error)
            self.put("file", name, str(path.absolute()))
            return False
        self.put("file", name, str(place.relative_to(self.folder)))
        return self._in_memory_since is None

    def put_tree(self, kind: str, name: str, content: Mapping[str, Any], fill: Callable[[Path], object]) -> None:
        """Note a record with a folder of files, which ``fill`` writes into the folder that it is given."""
        try:
            place = self._new_place()
            fill(place)
        except Exception as error:  # whoever writes a file has an error of his own for a full disk
            self._say_full(error)
            self._volatile.append(name)
            self._temporary = self._temporary or tempfile.TemporaryDirectory()
            place = Path(tempfile.mkdtemp(dir=self._temporary.name))
            fill(place)
        inside = place.is_relative_to(self.folder)
        self.put(kind, name, {**content, "files": str(place.relative_to(self.folder) if inside else place)})

    def _new_place(self) -> Path:
        files = self.folder / "files"
        files.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=files))

    def place(self, name: str) -> Path:
        """Where a file is that a record names."""
        return self.folder / name  # an absolute name stays as it is

    def flush(self) -> None:
        """Write down what was added."""
        with self._lock:
            pending, self._pending = self._pending, []
            if pending:
                self._write(
                    "INSERT OR IGNORE INTO metrics (key, step, value, timestamp) VALUES (?, ?, ?, ?)", pending
                )
            elif self._in_memory_since is not None and time.monotonic() - self._in_memory_since > RETURN_SECONDS:
                self._return_to_disk()

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            self._many(statement, rows)
        except sqlite3.OperationalError as error:
            if self._in_memory_since is not None:
                raise
            memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            self._db.backup(memory)
            self._db.close()
            self._db = memory
            self._say_full(error)
            self._many(statement, rows)
        if self._in_memory_since is not None and time.monotonic() - self._in_memory_since > RETURN_SECONDS:
            self._return_to_disk()

    def _many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._db.execute("BEGIN")
        try:
            self._db.executemany(statement, rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _say_full(self, error: Exception) -> None:
        if self._in_memory_since is None:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            log.warning(
                "warning: %s cannot be written (%s): training goes on, and what is logged is kept in memory until "
                "the tracking store has it.", self.folder, why,
            )  # fmt: skip
        self._in_memory_since = time.monotonic()

    def _return_to_disk(self) -> None:
        self._in_memory_since = time.monotonic()
        disk = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk = self._open(0.0)
            self._db.backup(disk)
        except (OSError, sqlite3.Error):
            if disk is not None:
                disk.close()
            return
        self._db.close()
        self._db, self._in_memory_since = disk, None
        log.warning("%s can be written again.", self.folder)

    def _write_on(self) -> None:
        while not self._closing.wait(WRITE_SECONDS):
            self.flush()

    # What a resumed run has already -------------------------------------------------------

    def seed(self, key: str, points: Iterable[tuple[int, float]]) -> None:
        """Note points of a metric that the store has."""
        with self._lock:
            self._write(
                f"INSERT OR IGNORE INTO metrics (key, step, value, timestamp, state) VALUES (?, ?, ?, 0, {DELIVERED})",
                [(key, step, _storable(value)) for step, value in points],
            )

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        self.flush()
        found = self._all("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", key)
        return [(step, math.nan if value is None else value) for step, value in found]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever noted."""
        return not self._all("SELECT 1 FROM metrics LIMIT 1") and not self._all("SELECT 1 FROM records LIMIT 1")

    # What waits ----------------------------------------------------------------------------

    def waiting(self) -> int:
        """Metrics and records that the store has not confirmed."""
        self.flush()
        [[metrics]] = self._all(f"SELECT count(*) FROM metrics WHERE state = {WAITS}")
        [[records]] = self._all(f"SELECT count(*) FROM records WHERE state = {WAITS}")
        return int(metrics + records)

    def rows(self, limit: int) -> list[Row]:
        """The first metrics that wait."""
        found = self._all(
            f"SELECT number, key, value, timestamp, step FROM metrics WHERE state = {WAITS} ORDER BY number LIMIT ?",
            limit,
        )
        return [Row(n, key, math.nan if value is None else value, at, step) for n, key, value, at, step in found]

    def records(self, limit: int) -> list[Record]:
        """The first records that wait."""
        found = self._all(
            f"SELECT number, kind, name, content, data FROM records WHERE state = {WAITS} ORDER BY number LIMIT ?",
            limit,
        )
        return [Record(n, kind, name, json.loads(content), data) for n, kind, name, content, data in found]

    def mark(self, table: str, numbers: Iterable[int], state: int = DELIVERED, result: Any = None) -> None:
        """Note that the store has them, or that it refuses them."""
        with self._lock:
            if table == "metrics":
                self._write("UPDATE metrics SET state = ? WHERE number = ?", [(state, n) for n in numbers])
            else:
                answer = json.dumps(result)
                values = [(state, answer, n) for n in numbers]
                self._write("UPDATE records SET state = ?, result = ?, data = NULL WHERE number = ?", values)

    def refused(self) -> int:
        """Metrics and records that the store did not want."""
        [[metrics]] = self._all(f"SELECT count(*) FROM metrics WHERE state = {REFUSED}")
        [[records]] = self._all(f"SELECT count(*) FROM records WHERE state = {REFUSED}")
        return int(metrics + records)

    def has(self, kind: str) -> bool:
        """Whether a record of the kind was noted, delivered or not."""
        return bool(self._all("SELECT 1 FROM records WHERE kind = ? LIMIT 1", kind))

    def answers(self) -> dict[str, Any]:
        """What the store answered, by kind of record."""
        found = self._all("SELECT kind, result FROM records WHERE result IS NOT NULL AND result <> 'null'")
        return {kind: json.loads(result) for kind, result in found}

    def contents(self, kind: str) -> dict[str, Any]:
        """What the records of a kind hold, by name, delivered or not."""
        found = self._all("SELECT name, content FROM records WHERE kind = ?", kind)
        return {name: json.loads(content) for name, content in found}

    def newest(self) -> dict[str, float]:
        """Every metric's value at its last step."""
        found = self._all("SELECT key, value, max(step) FROM metrics GROUP BY key")
        return {key: math.nan if value is None else value for key, value, _ in found}

    def file(self, name: str) -> bytes | None:
        """A small file that was noted; None where there is none, or it was delivered."""
        found = self._all("SELECT data FROM records WHERE kind = 'file' AND name = ?", name)
        return found[0][0] if found else None

    def forget(self, kind: str) -> None:
        """Drop the records of a kind."""
        with self._lock:
            self._write("DELETE FROM records WHERE kind = ?", [(kind,)])

    # Facts ---------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """A fact about the run; None where it is not known."""
        found = self._all("SELECT value FROM facts WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    def set_fact(self, name: str, value: Any) -> None:
        """Note a fact."""
        with self._lock:
            self._write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", [(name, json.dumps(value))])

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # The end -------------------------------------------------------------------------------

    def close(self, *, ended: bool) -> int:
        """Close it, and remove it where the run has ended and nothing waits; returns what is lost.

        Lost is what the disk would not take, and the store has not taken either.
        """
        self._closing.set()
        self._writer.join()
        with self._lock:
            waiting = self.waiting()
            if self._in_memory_since is not None:
                self._return_to_disk()
            lost = 0
            if self._in_memory_since is not None:
                lost = waiting
            else:
                for name in self._volatile:
                    values = (REFUSED, name, WAITS)
                    lost += self._db.execute(
                        "UPDATE records SET state = ? WHERE name = ? AND state = ?", values
                    ).rowcount
            self._db.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        if ended and not waiting:
            shutil.rmtree(self.folder, ignore_errors=True)
        return lost


def _storable(value: float) -> float:
    value = float(value)
    # MLflow's databases hold no infinity of their own.
    return value if math.isfinite(value) or math.isnan(value) else math.copysign(LARGEST_FLOAT, value)


def _set_aside(folder: Path) -> Path:
    """Rename a damaged database and what belongs to it; returns its new path."""
    number = len(list(folder.glob(f"damaged-*-{DATABASE}"))) + 1
    for end in ("-wal", "-shm", ""):
        part = folder / (DATABASE + end)
        if part.exists():
            part.rename(folder / f"damaged-{number}-{part.name}")
    return folder / f"damaged-{number}-{DATABASE}"


def _rescue(damaged: Path, db: sqlite3.Connection) -> int:
    """Take over the rows of a damaged database that can be read; returns how many."""
    taken = 0
    for table in ("facts", "metrics", "records"):
        with closing(sqlite3.connect(damaged)) as source, suppress(sqlite3.DatabaseError):
            for row in source.execute(f"SELECT * FROM {table}"):
                taken += db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row).rowcount
    return taken
