"""Paths: a file, a directory or a glob as the files of each split."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from elman.errors import DataError
from elman.text.readers import looks_like_text

Splits = dict[str, list[Path]]

_DATA_SUFFIXES = {".txt", ".jsonl", ".ndjson", ".parquet", ".tokens", ".raw"}
_SPLIT_OF_PART = {
    "train": "train", "training": "train",
    "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip


def find_files(name: str, setting: str, known: Iterable[str] = ()) -> tuple[list[Path], list[str]]:
    """Files that a path, a directory or a glob stands for, sorted by name, and warnings.

    A directory gives its data files (.txt, .jsonl, .parquet, compressed or not) at any depth or,
    where it has none, every file that is text. Hidden files are skipped.

    Args:
        name: What the user wrote.
        setting: The setting it was written in, for the error.
        known: Names that are no paths but might have been meant.

    Raises:
        DataError: If nothing is there, or nothing in it is text.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.exists():
        if not path.is_file():  # a pipe would be read once and waited for ever after
            raise DataError(f"{setting}: {name} is neither a file nor a directory: save the text to a file.")
        _check_readable(path)
        return [path], []
    if glob.has_magic(name):
        matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = sorted(match for match in matches if match.is_file())
        if not found:
            raise DataError(f"{setting}: no file matches {name}: mend the pattern.")
        for match in found:
            _check_readable(match)
        return found, []
    raise DataError(f"{setting}: {name} is neither a corpus nor a path that exists.{_suggestion(path, known)}")


def group_by_split(files: list[Path]) -> tuple[Splits, list[str]]:
    """Official splits by file name, and warnings.

    Where data files are named as train and as another split (a part of the name between dots,
    hyphens or underscores), those are the splits. Otherwise all files are ``train``.
    """
    named: Splits = {}
    for path in files:
        split = _split_of(path)
        if split:
            named.setdefault(split, []).append(path)
    if "train" not in named or len(named) == 1:
        return {"train": files}, []
    left_out = len(files) - sum(map(len, named.values()))
    warnings = [f"{left_out} files whose names give no split were left out."] if left_out else []
    return {split: named[split] for split in ("train", "validation", "test") if split in named}, warnings


def digest_files(splits: Splits) -> str:
    """SHA-256 of the content: of the file itself where there is one, else over every file's."""
    hashes = [(split, _digest(path)) for split, files in splits.items() for path in files]
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{split} {digest}\n" for split, digest in hashes).encode()).hexdigest()


def _in_directory(directory: Path) -> tuple[list[Path], list[str]]:
    files: list[Path] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        files += [Path(folder, entry) for entry in names if not entry.startswith(".")]
    files.sort()
    data = [path for path in files if _data_suffix(path)]
    warnings = []
    if data:
        if others := len(files) - len(data):
            warnings.append(
                f"{directory}: took the {len(data)} data files (.txt, .jsonl, .parquet) and left out {others} others; "
                f"a glob such as {directory}/**/*.py takes what it matches."
            )
        for path in data:
            _check_readable(path)
    else:
        data = [path for path in files if looks_like_text(path)]
    if not data:
        raise DataError(f"{directory}: the directory holds no text file: name another directory or a file.")
    return data, warnings


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty: name a file that holds text.")


def _data_suffix(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix in _DATA_SUFFIXES


def _split_of(path: Path) -> str | None:
    """Split that a data file's name tells; source code in ``test_it.py`` tells none."""
    if not _data_suffix(path):
        return None
    for part in re.split(r"[._-]", path.name.lower()):
        if part in _SPLIT_OF_PART:
            return _SPLIT_OF_PART[part]
    return None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _suggestion(path: Path, known: Iterable[str]) -> str:
    """The nearest names that do exist, else where to look."""
    try:
        beside = {str(entry): entry.name for entry in path.parent.iterdir()}
    except OSError:
        beside = {}
    near = difflib.get_close_matches(str(path), list(known), 2, 0.6)
    near += [full for full, entry in beside.items() if difflib.get_close_matches(path.name, [entry], 1, 0.6)][:2]
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Corpora by name: {', '.join(known)}." if known else " Check the path."
