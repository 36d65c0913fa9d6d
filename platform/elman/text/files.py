"""Paths: a file, a directory or a glob as the files of each split."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
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
    path, mode = _look_at(name, setting)
    if stat.S_ISDIR(mode):
        return _in_directory(path)
    if mode:
        if not stat.S_ISREG(mode):  # a pipe would be read once and waited for ever after
            raise DataError(f"{setting}: {name} is neither a file nor a directory: save the text to a file.")
        _check_readable(path)
        return [path], []
    if glob.has_magic(name):
        found = sorted(_matching(str(path)))
        if not found:
            raise DataError(f"{setting}: no file matches {name}: mend the pattern.")
        for match in found:
            _check_readable(match)
        return found, []
    raise DataError(f"{setting}: {name} is neither a corpus nor a path that exists.{_suggestion(path, known)}")


def _look_at(name: str, setting: str) -> tuple[Path, int]:
    """The path that a name stands for, and the mode of what is there; 0 where nothing is.

    Raises:
        DataError: It is no path, or a link that leads nowhere.
    """
    try:
        path = Path(name).expanduser()
        return path, path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"{setting}: {name} is a link that leads nowhere: name a file.") from None
        return path, 0
    except OSError as error:
        raise DataError(f"{setting}: {name} cannot be read: {error.strerror}: name another file.") from None
    except (ValueError, RuntimeError) as error:  # a NUL in it; a ~user who does not exist
        raise DataError(f"{setting}: {name} is no path ({error}): name a file or a directory.") from None


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
    files = sorted(path for path in files if path.is_file() or not path.exists())  # a pipe would be waited for
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


def _matching(pattern: str) -> list[Path]:
    """Files that a glob matches. ``**`` follows no link, for one that leads upwards has no end."""
    if "**" not in Path(pattern).parts:
        return [match for match in map(Path, glob.glob(pattern)) if match.is_file()]  # noqa: PTH207 - takes absolute ones
    parts = Path(pattern).parts
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = Path(*parts[:fixed]), parts[fixed:]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        paths = (Path(folder, entry) for entry in names)
        found += [path for path in paths if _matches(path.relative_to(root).parts, wanted) and path.is_file()]
    return found


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's parts are those of a glob; hidden ones match no wildcard."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (names[0][0] != "." and _matches(names[1:], pattern))
    hidden = names[0][0] == "." and pattern[0][0] != "."
    return not hidden and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


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
