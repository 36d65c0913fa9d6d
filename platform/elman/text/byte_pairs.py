"""Byte pairs: what they are learned from; and a part between two spaces is encoded once, then looked up.

The pattern of byte-level BPE (Radford et al. 2019) cuts a text before a space, and after a line end, that stands
between two characters that are not space, whatever surrounds them. So the ids of a text are those of its
parts in a row. Running text repeats its words: what the library would work out for each is then a look-up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elman.text.tokenizer import Tokenizer

_MOST_PARTS = 1 << 18
_MOST_CHARACTERS = 1 << 23  # of all parts that are kept: some tens of megabytes with what Python adds
_PAUSE = 16  # batches for which a text that does not repeat itself goes through the library alone
_GLUED = "\0"  # begins a part that no space precedes; no text of ours holds one

_LONGEST_RUN = 1 << 10  # characters of one kind that are learned from whole: the library's time is quadratic
_NO_SPACE = 1 << 14  # characters without white space, which no running text has in any script
_SHORT = 256  # characters
_TAUGHT = 1 << 22  # characters of such that are learned from at all: the library keeps every distinct piece
_RUN = re.compile("|".join(f"{kind}{{{_LONGEST_RUN}}}" for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]", "_", r"\s")))


def short_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with those that go on and on, without white space or in one kind of character, in short pieces."""
    taught = 0
    for text in texts:
        if not _goes_on(text):
            yield text
        elif taught < _TAUGHT:
            taught += len(text)
            yield from (text[place : place + _SHORT] for place in range(0, len(text), _SHORT))


def _goes_on(text: str) -> bool:
    if len(text) <= _LONGEST_RUN:
        return False
    longest = max(map(len, text.split()), default=0)
    suspect = longest > _LONGEST_RUN or len(text) > 4 * _LONGEST_RUN  # the latter may be white space
    return longest > _NO_SPACE or (suspect and _RUN.search(text) is not None)


class BytePairTable:
    """Encodes as ``tokenizer.encode_batch`` does, at bpe level, and remembers the parts that it met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pause = 0
        self._forget()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger[Any]]]:
        """Ids of each text, as an array (tokens,) of the tokenizer's ``dtype``.

        Raises:
            DataError: If a text holds a lone surrogate.
        """
        if self._pause or any(_GLUED in text for text in texts):
            self._pause = max(0, self._pause - 1)
            return self._tokenizer.encode_batch(texts)
        if len(self._parts) > _MOST_PARTS or self._parts.characters > _MOST_CHARACTERS:
            self._forget()
        rows = [self._rows(text) for text in texts]
        if 2 * self._learn(rows) > sum(map(len, texts)):
            self._pause = _PAUSE
        return [self._gather(row) for row in rows]

    def _forget(self) -> None:
        self._parts = _Parts()
        self._ids = np.zeros(0, dtype=self._tokenizer.dtype)
        self._begin = self._length = np.zeros(0, dtype=np.int64)

    def _rows(self, text: str) -> NDArray[np.intp]:
        """Rows of the text's parts in the table; new ones are given rows."""
        words = (_GLUED + text.replace("\n", f"\n {_GLUED}")).split(" ")
        if text.endswith("\n"):
            words.pop()  # nothing stands behind the last line end
        rows: NDArray[np.intp] = np.fromiter(map(self._parts.__getitem__, words), dtype=np.intp, count=len(words))
        kinds = np.frombuffer(self._parts.kinds, dtype=np.uint8)[rows]
        hang = ((kinds[:-1] & _OPEN_AT_END) != 0) | ((kinds[1:] & _OPEN_AT_START) != 0)
        if not hang.any():
            return rows
        begins = np.append(True, ~hang)
        firsts = np.flatnonzero(begins)
        ends = np.append(firsts[1:], len(words))
        for i in np.flatnonzero(ends - firsts > 1).tolist():
            first, end = int(firsts[i]), int(ends[i])
            rows[first] = self._parts[" ".join(words[first:end])]
        whole: NDArray[np.intp] = rows[begins]
        return whole

    def _learn(self, rows: Sequence[NDArray[np.intp]]) -> int:
        """Encode what these rows stand for, as far as it is not known: so many characters."""
        more = len(self._parts) - len(self._length)
        self._length = np.append(self._length, np.full(more, -1))
        self._begin = np.append(self._begin, np.zeros(more, dtype=np.int64))
        wanted = np.zeros(len(self._parts), dtype=bool)
        for row in rows:
            wanted[row] = True
        new = np.flatnonzero(wanted & (self._length < 0))
        if not len(new):
            return 0
        parts = [self._parts.unknown.pop(row) for row in new.tolist()]
        texts = [part[1:] if part.startswith(_GLUED) else " " + part for part in parts]
        arrays = self._tokenizer.encode_batch([text.replace(f" {_GLUED}", "") for text in texts])
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        self._length[new], self._begin[new] = lengths, len(self._ids) + np.cumsum(lengths) - lengths
        self._ids = np.concatenate([self._ids, *arrays])
        return sum(map(len, parts))

    def _gather(self, rows: NDArray[np.intp]) -> NDArray[np.unsignedinteger[Any]]:
        lengths = self._length[rows]
        ends = np.cumsum(lengths)
        places = np.repeat(self._begin[rows] - ends + lengths, lengths)
        return self._ids[places + np.arange(len(places))]


_OPEN_AT_START, _OPEN_AT_END = 1, 2


class _Parts(dict[str, int]):
    """Row of each part; a part that is not there is given the next one.

    Attributes:
        kinds: For each row whether its part may not be cut off from what precedes or follows it.
        unknown: The parts of rows whose ids nobody has asked for.
        characters: Lengths of all parts, summed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds = bytearray()
        self.unknown: dict[int, str] = {}
        self.characters = 0

    def __missing__(self, part: str) -> int:
        row = self[part] = len(self)
        body = part.removeprefix(_GLUED)
        last = body[:-1] if body.endswith("\n") else body
        opens = 0 if body and not body[0].isspace() else _OPEN_AT_START
        self.kinds.append(opens | (0 if last and not last[-1].isspace() else _OPEN_AT_END))
        self.unknown[row] = part
        self.characters += len(part)
        return row
