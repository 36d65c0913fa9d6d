"""Readers: local files as batches of text of bounded size, with errors that name the place.

A batch is a list of pieces (text, starts a document). Pieces of one document follow each other,
so a single line of any length passes through in blocks.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from elman.errors import DataError

Piece = tuple[str, bool]
Batch = list[Piece]
Normalise = Callable[[str, str], str]

BLOCK = 1 << 20  # bytes read at once, and about the characters in a batch
LARGEST_ROW = 1 << 28  # bytes of a line of .jsonl, which has to be held whole: a compressed one may be of any length
_LEAST_ROWS = 4096  # rows after which a batch of tiny documents is full
_ROW_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_BOM = codecs.BOM_UTF8


def holds_rows(path: Path) -> bool:
    """Whether each line of this file is a JSON object that holds one document."""
    return path.name.lower().endswith(_ROW_SUFFIXES)


def read_file(path: Path, column: str, separator: str | None, encoding_errors: str) -> Iterator[Batch]:
    """Batches of a plain or .jsonl file, compressed or not.

    Args:
        path: File to read.
        column: Key that holds the text in .jsonl.
        separator: Text that ends a document in a plain file, and stays with it; None makes one document.
        encoding_errors: ``strict``, ``replace`` or ``ignore``.

    Raises:
        DataError: For invalid UTF-8, NUL bytes, truncated gzip, malformed JSON or a missing key;
            names the byte or the line.
    """
    try:
        with _open(path) as file:
            if holds_rows(path):
                yield from in_batches((text, True) for text in _rows(path, file, column, encoding_errors))
            else:
                blocks = _blocks(path, file, encoding_errors)
                yield from in_batches(_documents(blocks, separator) if separator else _whole(blocks))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short ({error}): fetch the file again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def in_batches(pieces: Iterable[Piece], size: int = BLOCK) -> Iterator[Batch]:
    """Gather pieces into batches of about ``size`` characters, cutting longer ones."""
    batch: Batch = []
    held = 0
    for text, starts in pieces:
        for place in range(0, len(text), size) if len(text) > size else (0,):
            part = text[place : place + size] if len(text) > size else text
            batch.append((part, starts and place == 0))
            held += len(part)
            if held >= size or len(batch) >= _LEAST_ROWS:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def as_row(text: str) -> str:
    """A row's text with a line end."""
    return text if text.endswith("\n") else text + "\n"


def check_row(text: object, place: str, encoding_errors: str) -> str:
    """The text of one row.

    Raises:
        DataError: If it is no text, holds a NUL, or a lone surrogate where errors are strict.
    """
    if not isinstance(text, str):
        raise DataError(f"{place}: holds {type(text).__name__}, not text: set corpus.column to a column of text.")
    if "\0" in text:
        raise DataError(f"{place}: holds a NUL character at {text.index(chr(0))}: this is no plain text.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if encoding_errors == "strict":
                raise DataError(
                    f"{place}: character {error.start} is a lone surrogate, not Unicode text: mend the file, or set "
                    "corpus.encoding_errors to replace or ignore."
                ) from None
            text = text.encode("utf-8", "surrogatepass").decode("utf-8", encoding_errors)
    return text


def looks_like_text(path: Path) -> bool:
    """Whether the start of the file is UTF-8 without NUL bytes."""
    try:
        with _open(path) as file:
            start = file.read(1 << 16)
    except (OSError, EOFError, zlib.error):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start and start.strip() != b""


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _blocks(path: Path, file: BinaryIO, encoding_errors: str) -> Iterator[str]:
    """Text of the file block by block, without a byte-order mark at its start; line ends as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors=encoding_errors)
    offset = 0
    while block := file.read(BLOCK):
        if (nul := block.find(b"\0")) >= 0:
            raise DataError(f"{path}: byte {offset + nul} is NUL: {_instead_of_text(block if not offset else b'')}.")
        skipped = len(_BOM) if offset == 0 and block.startswith(_BOM) else 0
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block[skipped:])
        except UnicodeDecodeError as error:
            raise _invalid(path, offset + skipped - pending + error.start, error) from None
        if text:
            yield text
        offset += len(block)
    pending = len(decoder.getstate()[0])
    try:
        text = decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _invalid(path, offset - pending + error.start, error) from None
    if text:
        yield text


_KINDS = (
    (0, b"PK", "zip archive"), (257, b"ustar", "tar archive"), (0, b"\x1f\x8b", "gzip file"), (0, b"BZh", "bzip2 file"),
    (0, b"\xfd7zXZ", "xz file"), (0, b"\x28\xb5\x2f\xfd", "zstd file"), (0, b"7z\xbc\xaf", "7z archive"),
    (0, b"Rar!", "rar archive"), (0, b"%PDF", "PDF"),
)  # fmt: skip


def _instead_of_text(start: bytes) -> str:
    """What a file that holds a NUL is, and what to do about it."""
    kind = next((kind for place, magic, kind in _KINDS if start[place : place + len(magic)] == magic), None)
    if kind is not None:
        return f"this is a {kind}, which is not unpacked here: take the text out of it, and name that"
    perhaps = " but UTF-16, perhaps: save it as UTF-8" if b"\0" in start[:4] else ""
    return f"this is no UTF-8 text{perhaps}"


def _invalid(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{path}: byte {offset} (0x{byte:02X}) is not valid UTF-8: convert the file to UTF-8, or set "
        "corpus.encoding_errors to replace or ignore."
    )


def _whole(blocks: Iterable[str]) -> Iterator[Piece]:
    starts = True
    for text in blocks:
        yield text, starts
        starts = False


def _documents(blocks: Iterable[str], separator: str) -> Iterator[Piece]:
    """Cut after each separator, wherever the borders of blocks fall."""
    held, starts = "", True
    for block in blocks:
        *documents, held = (held + block).split(separator)
        for document in documents:
            yield document + separator, starts
            starts = True
        safe = len(held) - len(separator) + 1  # the rest may be a separator's beginning
        if safe > 0:
            yield held[:safe], starts
            held, starts = held[safe:], False
    if held:
        yield held, starts


def _rows(path: Path, file: BinaryIO, column: str, encoding_errors: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LARGEST_ROW + 1), b""), 1):
        place = f"{path}:{number}"
        if len(line) > LARGEST_ROW:
            raise DataError(f"{place}: is longer than {LARGEST_ROW:,} bytes, and a row is held whole: cut it up.")
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", encoding_errors))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start} of the line is not valid UTF-8: convert the file to UTF-8, or set "
                "corpus.encoding_errors to replace or ignore."
            ) from None
        except (ValueError, RecursionError) as error:  # the former also of an integer of thousands of digits
            raise DataError(f"{place}: is not JSON ({error}): mend or remove the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: holds a JSON {type(row).__name__}, not an object with a column of text.")
        if column not in row:
            raise missing_column(place, column, list(row))
        yield as_row(check_row(row[column], f"{place}: column {column}", encoding_errors))


def missing_column(place: str, column: str, columns: Sequence[str]) -> DataError:
    """The error for a column that is not there, naming those that are."""
    return DataError(f"{place}: has no column {column!r}: set corpus.column to one of {', '.join(columns) or 'none'}.")
