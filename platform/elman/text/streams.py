"""Streams: texts of any length, read again and again in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal, Protocol

from elman.text.readers import Batch

Unit = Literal["characters", "bytes"]


class Stream(Protocol):
    """A text that can be read from its start any number of times."""

    @property
    def size(self) -> int | None:
        """About how many bytes will be read; None where nobody knows."""

    def batches(self) -> Iterator[Batch]:
        """The text's pieces in order, each flagged whether it starts a document."""


@dataclass(frozen=True)
class RangeStream:
    """A contiguous part of another stream, which begins as a document of its own.

    A border in bytes that falls into a character is moved to that character's end.
    """

    base: Stream
    start: int
    stop: int | None = None
    unit: Unit = "characters"

    @property
    def size(self) -> int | None:
        """The range itself, or what is left of the base."""
        if self.stop is not None:
            return self.stop - self.start
        return None if self.base.size is None else max(0, self.base.size - self.start)

    def batches(self) -> Iterator[Batch]:
        """Pieces of the range; reads no further than its end."""
        place, begun = 0, False
        batches: Iterator[Batch]
        if isinstance(self.base, SharedStream) and self.unit == "characters":
            place, batches = self.base.batches_from(self.start)
        else:
            batches = self.base.batches()
        for batch in batches:
            kept: Batch = []
            for text, starts in batch:
                length = len(text) if self.unit == "characters" else len(text.encode("utf-8"))
                first = max(0, self.start - place)
                last = length if self.stop is None else min(length, self.stop - place)
                place += length
                if first >= length or last <= 0:
                    continue
                part = text if (first, last) == (0, length) else self._cut(text, first, last)
                if part:
                    kept.append((part, starts or not begun))
                    begun = True
            if kept:
                yield kept
            if self.stop is not None and place >= self.stop:
                return

    def _cut(self, text: str, first: int, last: int) -> str:
        if self.unit == "characters":
            return text[first:last]
        raw = text.encode("utf-8")
        first, last = (_character_border(raw, border) for border in (first, last))
        return raw[first:last].decode("utf-8")


class SharedStream:
    """A stream of which ranges are read: where one ended the next goes on, if it begins there or later."""

    def __init__(self, base: Stream) -> None:
        self._base = base
        self._left: tuple[int, Iterator[Batch]] | None = None

    @property
    def size(self) -> int | None:
        """The base's."""
        return self._base.size

    def batches(self) -> Iterator[Batch]:
        """The base's, from its start."""
        return self._base.batches()

    def batches_from(self, start: int) -> tuple[int, Iterator[Batch]]:
        """Batches of which one holds the character ``start``, and the character at which the first begins."""
        place, batches = self._left if self._left and self._left[0] <= start else (0, self._base.batches())
        self._left = None
        return place, self._read(place, batches)

    def _read(self, place: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            try:
                yield batch
            except GeneratorExit:  # the reader has enough
                self._left = place, chain([batch], batches)
                raise
            place += sum(len(text) for text, _ in batch)


@dataclass(frozen=True)
class ChainStream:
    """Streams one after the other."""

    parts: Sequence[Stream]

    @property
    def size(self) -> int | None:
        """Sum of the parts, where all are known."""
        sizes = [part.size for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def batches(self) -> Iterator[Batch]:
        """The pieces of each part in turn."""
        for part in self.parts:
            yield from part.batches()


@dataclass(frozen=True)
class ThinnedStream:
    """A share of another stream: the beginning of each of a number of equal blocks of it.

    Args:
        base: The whole.
        characters: Its length.
        fraction: Share of each block that stays.
        blocks: How many; each kept piece begins as a document of its own.
    """

    base: Stream
    characters: int
    fraction: float
    blocks: int = 20

    @property
    def size(self) -> int | None:
        """The share of the base."""
        return None if self.base.size is None else int(self.base.size * self.fraction)

    def batches(self) -> Iterator[Batch]:
        """Pieces of the blocks' beginnings, read in one pass."""
        borders = [self.characters * i // self.blocks for i in range(self.blocks + 1)]
        spans = [(a, a + round((b - a) * self.fraction)) for a, b in pairwise(borders)]
        place, index, begun = 0, 0, False
        for batch in self.base.batches():
            kept: Batch = []
            for text, starts in batch:
                end = place + len(text)
                while index < len(spans) and spans[index][0] < end:
                    first, last = max(spans[index][0], place), min(spans[index][1], end)
                    if first < last:
                        kept.append((text[first - place : last - place], (starts and first == place) or not begun))
                        begun = True
                    if spans[index][1] > end:
                        break
                    index, begun = index + 1, False
                place = end
            if kept:
                yield kept


def count_characters(stream: Stream, limit: int | None = None) -> int:
    """Characters in the stream, or ``limit`` if there are more."""
    characters = 0
    for batch in stream.batches():
        characters += sum(len(text) for text, _ in batch)
        if limit is not None and characters >= limit:
            return limit
    return characters


def _character_border(raw: bytes, border: int) -> int:
    while 0 < border < len(raw) and raw[border] & 0xC0 == 0x80:
        border += 1
    return border
