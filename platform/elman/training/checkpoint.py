"""Checkpoints on the disk: each whole or not at all, and known for sound by its SHA-256.

A run's folder, while it trains::

    best.ckpt            the checkpoint with the lowest validation loss
    000041/state.ckpt    the state that a training goes on from
    000041/best.ckpt     a hard link to what was the best then
    000041/SHA256SUMS    as sha256sum writes it

A state is written beside and renamed when it is complete, its files and folders synced
before. Three states are kept; the newest sound one counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from elman.errors import UnusableCheckpointsError
from elman.models.state import to_device
from elman.training.loading import read_checkpoint

KEPT = 3
"""States of a run that are kept."""

STATE, BEST, LAST, SUMS = "state.ckpt", "best.ckpt", "last.ckpt", "SHA256SUMS"
PARTIAL = ".partial"


class UnwrittenError(Exception):
    """The disk did not take a checkpoint.

    Attributes:
        checkpoint: What it would have held.
    """

    def __init__(self, error: OSError, checkpoint: dict[str, Any]) -> None:
        super().__init__(error.strerror or str(error))
        self.checkpoint = checkpoint


class _Hashing:
    """A file that hashes what is written, and keeps the error that torch would disguise."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self._file.flush()


def write_whole(path: Path, write: Callable[[Any], object]) -> str:
    """Write a file beside, sync it, and rename it: whoever reads sees all of it or the one before.

    Args:
        path: The file.
        write: Given an open binary file.

    Returns:
        Its SHA-256, hexadecimal.

    Raises:
        OSError: The disk is full or broken; what stood at ``path`` stands.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # what lies there may be another name of a file that must stay as it is
    try:
        with partial.open("xb") as file:
            hashing = _Hashing(file)
            try:
                write(hashing)
            except RuntimeError:
                if hashing.error is not None:
                    raise hashing.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return hashing.sha256.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DurableIO(CheckpointIO):
    """How Lightning writes and reads our checkpoints.

    Its own way stages in $TMPDIR, from where a full disk truncates the checkpoint that it replaces.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.digests: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it whole, and note its digest.

        Raises:
            UnwrittenError: The disk does not take it; what stood there stands.
        """
        path = Path(path)
        try:
            self.digests[path] = write_whole(path, lambda file: torch.save(checkpoint, file))
        except OSError as error:
            raise UnwrittenError(error, checkpoint) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one of ours; what neither Lightning nor an optimizer moves goes to the device here."""
        checkpoint = read_checkpoint(Path(path))
        if checkpoint["carry"] is not None:
            checkpoint["carry"] = to_device(checkpoint["carry"], self._device)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


def durable_io(trainer: L.Trainer) -> DurableIO:
    """The trainer's."""
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, DurableIO)
    return io


class States:
    """The numbered states in a run's folder. Whoever writes holds the folder's lock.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: list[Path] = []

    @property
    def newest(self) -> Path | None:
        """The newest state known to be sound: found so, or written by this process."""
        return self._sound[-1] if self._sound else None

    def _numbered(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if re.fullmatch(r"\d{6,}", path.name)), key=lambda p: int(p.name)
        )

    def find(self) -> tuple[Path | None, list[Path]]:
        """The newest sound state, and the damaged ones that are newer; clears away what was never finished.

        Raises:
            UnusableCheckpointsError: There are states, and all of them are damaged.
        """
        for path in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        damaged: list[Path] = []
        for path in reversed(self._numbered()):
            if is_sound(path):
                self._sound = [path]
                return path, damaged
            damaged.append(path)
        if damaged:
            names = ", ".join(str(path / STATE) for path in damaged)
            raise UnusableCheckpointsError(
                f"every checkpoint of run {self.folder.name} is damaged: {names}. Restore one, or start a new run."
            )
        return None, []

    def write(self, save: Callable[[Path], str], best: tuple[Path, str] | None) -> Path:
        """Add a state, and let go of those beyond the newest three sound ones.

        Args:
            save: Writes the file it is given, durably, and returns its SHA-256.
            best: The best checkpoint so far and its SHA-256.

        Raises:
            OSError: The disk is full or broken; every earlier state stands.
        """
        numbered = self._numbered()
        number = int(numbered[-1].name) + 1 if numbered else 1
        path = self.folder / f"{number:06d}"
        partial = path.with_name(path.name + PARTIAL)
        try:
            partial.mkdir(parents=True)
            sums = {STATE: save(partial / STATE)}
            if best is not None:
                link(best[0], partial / BEST)
                sums[BEST] = best[1]
            text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
            write_whole(partial / SUMS, lambda file: file.write(text.encode()))
            sync_folder(partial)
            partial.rename(path)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._sound = [*self._sound, path][-KEPT:]
        for old in numbered:
            if old not in self._sound:
                _remove(old)
        return path

    def discard(self, path: Path) -> None:
        """Remove a state that turned out to lead nowhere."""
        if path in self._sound:
            self._sound.remove(path)
            _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: half a state must not look like a damaged one.
    shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)), ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def read_sums(path: Path) -> dict[str, str]:
    """File name → SHA-256, of a state.

    Raises:
        ValueError: The list is not one.
        OSError: It cannot be read.
    """
    lines = (path / SUMS).read_text("utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    if STATE not in sums:
        raise ValueError("no state in it")
    return sums


def is_sound(path: Path) -> bool:
    """Whether a state is all there, to the bit."""
    try:
        for name, digest in read_sums(path).items():
            if not (path / name).is_file():  # a pipe or a device would be read for ever
                return False
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError):
        return False
    return True


def put_back_best(path: Path, folder: Path) -> tuple[Path, str] | None:
    """Make the best checkpoint what it was when a state was written; returns it and its SHA-256."""
    best = folder / BEST
    if not (path / BEST).exists():
        best.unlink(missing_ok=True)
        return None
    staged = folder / (BEST + PARTIAL)
    staged.unlink(missing_ok=True)
    link(path / BEST, staged)
    staged.replace(best)
    staged.unlink(missing_ok=True)  # renaming one name of a file to another of the same file does nothing
    sync_folder(folder)
    return best, read_sums(path)[BEST]
