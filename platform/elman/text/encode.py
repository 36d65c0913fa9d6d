"""Encoding: a stream of text becomes a vocabulary, and a file of tokens with its counts.

Everything works batch by batch, so that memory does not grow with the text. Pieces are cut
anew only where the tokenizer would cut anyway, so the tokens are those of the whole text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from elman.config.schema import CorpusConfig, Level
from elman.errors import DataError
from elman.text.byte_pairs import BytePairTable, short_runs
from elman.text.readers import BLOCK, Batch, Piece, in_batches
from elman.text.spelling import SpellingModel
from elman.text.streams import Stream
from elman.text.tokenizer import END_OF_LINE, UNKNOWN, Tokenizer, code_points, split_words

Advance = Callable[[int], None]
"""Told how many more characters have been worked through."""

_BPE_PIECE = 1 << 12  # characters: the library is faster with short texts, and shares them among the cores
_LONG_WORD = 10_000  # characters: text that has no white space, for no language has such words
_MOST_IN_LONG_WORDS = 1 << 23  # characters: each is a symbol of its own, and kept in memory many times over
_FEW = 8  # texts in a batch that are worked on one by one; more of them are short, and cost more than what they hold
_HASHED = 1 << 20  # characters at a document's start that tell it from others, with its length


def learn_vocabulary(config: CorpusConfig, sample: Stream, advance: Advance) -> tuple[Tokenizer, SpellingModel | None]:
    """Tokenizer made from the training text, and what unknown symbols cost where there are any."""
    match config.level:
        case "byte":
            return Tokenizer.for_bytes(), None
        case "bpe":
            return Tokenizer.train_bpe(short_runs(_texts(sample, "bpe", advance)), config.vocabulary_size), None
        case "character":
            counts = _count_characters(_texts(sample, "character", advance))
            build = Tokenizer.from_characters
        case "word":
            counts, in_long_words = Counter(), 0
            for text in _texts(sample, "word", advance):
                counts.update(words := split_words(text))
                if len(words) < len(text) // 500:  # else there can be few long ones
                    in_long_words += sum(length for length in map(len, words) if length >= _LONG_WORD)
                if in_long_words > _MOST_IN_LONG_WORDS:
                    raise DataError(
                        f"{config.name}: {in_long_words:,} characters are in words of {_LONG_WORD:,} and more, so this "
                        "text has no words: set corpus.level to character, byte or bpe."
                    )
            build = Tokenizer.from_words
    tokenizer = build(counts, config.vocabulary_size, config.min_count)
    if config.level == "word":
        counts = {word: count for word, count in counts.items() if word not in (UNKNOWN, END_OF_LINE)}
    return tokenizer, SpellingModel.from_counts(counts)


@dataclass
class EncodedText:
    """Counts of one encoded text.

    Attributes:
        characters: Those of the text that the tokens stand for: at word level the words and one
            separator between any two, since runs of white space are not predicted.
        bytes: The same in UTF-8.
        unknown_tokens: ``<unk>`` tokens that hide a symbol of the text.
        unknown_types: Distinct symbols so hidden.
        unknown_bits: What they cost to spell, in bits.
        document_starts: Token indices (documents,).
        hashes: 8 bytes for each document that is not blank.
    """

    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    unknown_types: int = 0
    unknown_bits: float = 0.0
    document_starts: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))


def encode_stream(stream: Stream, tokenizer: Tokenizer, spelling: SpellingModel | None, sink: BinaryIO,
                  advance: Advance, *, hash_documents: bool) -> EncodedText:
    """Write the tokens of a text to ``sink``, little-endian, in the tokenizer's ``dtype``."""
    encoded = EncodedText()
    counter = _SymbolCounter(tokenizer)
    hasher = _DocumentHasher(encoded.hashes)
    for batch in recut(stream.batches(), tokenizer.level):
        texts = [text for text, _ in batch]
        arrays, lengths = counter.encode(texts, encoded)
        sink.writelines(np.ascontiguousarray(ids).data for ids in arrays)
        for (text, starts), length in zip(batch, lengths, strict=True):
            if starts and (not encoded.document_starts or encoded.document_starts[-1] != encoded.tokens):
                encoded.document_starts.append(encoded.tokens)
            encoded.tokens += length
            if hash_documents:
                hasher.feed(text, starts)
        advance(sum(map(len, texts)))
    hasher.end()
    encoded.unknown_types = len(counter.hidden)
    if spelling is not None:
        encoded.unknown_bits = sum((times * spelling.bits(symbol) for symbol, times in counter.hidden.items()), 0.0)
    encoded.unknown_tokens = sum(counter.hidden.values())
    if encoded.document_starts and encoded.document_starts[-1] >= encoded.tokens:
        encoded.document_starts.pop()
    return encoded


def batch_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[NDArray[np.unsignedinteger[Any]]]]:
    """What gives the ids of texts, one batch after another, as ``tokenizer.encode_batch`` does."""
    return BytePairTable(tokenizer).encode_batch if tokenizer.level == "bpe" else tokenizer.encode_batch


def recut(batches: Iterable[Batch], level: Level) -> Iterator[Batch]:
    """Batches whose pieces end where the tokenizer cuts anyway; only a word of a million characters is torn."""
    if level in ("byte", "character"):
        yield from batches
        return
    pieces = (piece for batch in batches for piece in batch)
    find, size = (_cut_of_words, BLOCK) if level == "word" else (_cut_of_byte_pairs, _BPE_PIECE)
    yield from in_batches(_recut(pieces, find, size))


def _recut(pieces: Iterable[Piece], find_cut: Callable[[str, int, int], int], size: int) -> Iterator[Piece]:
    held, held_starts = "", False
    for text, starts in pieces:
        if starts and held:
            yield held, held_starts
            held = ""
        held_starts = starts or (held_starts and held != "")
        held += text
        place = 0
        while len(held) - place > size:
            span = size
            while (cut := find_cut(held, place, place + span)) <= place and span < min(BLOCK, len(held) - place):
                span = min(4 * span, BLOCK)
            if cut <= place:
                if len(held) - place <= BLOCK:
                    break
                cut = place + BLOCK
            yield held[place:cut], held_starts
            place, held_starts = cut, False
        held = held[place:]
    if held:
        yield held, held_starts


def _cut_of_words(text: str, start: int, stop: int) -> int:
    """Last place before white space, not within a line end."""
    place = max(text.rfind(space, start, stop) for space in " \n\t\r")
    return place - 1 if place > start and text[place - 1 : place + 1] == "\r\n" else place


def _cut_of_byte_pairs(text: str, start: int, stop: int) -> int:
    """Last place after a line end, or before a space, that stands between two characters that are not space.

    The pre-tokenizer of byte-level BPE cuts there whatever surrounds it.
    """
    for space, after in (("\n", 1), (" ", 0)):
        place = stop
        for _ in range(1000):
            place = text.rfind(space, start, place)
            if place <= start:
                break
            if not text[place - 1].isspace() and place + 1 < len(text) and not text[place + 1].isspace():
                return place + after
    return -1


def _texts(stream: Stream, level: Level, advance: Advance) -> Iterator[str]:
    for batch in recut(stream.batches(), level):
        texts = [text for text, _ in batch]
        if level == "bpe":
            yield from texts
        else:
            yield (" " if level == "word" else "").join(texts)
        advance(sum(map(len, texts)))


def _count_characters(texts: Iterable[str]) -> dict[str, int]:
    counts: NDArray[np.int64] = np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        codes = code_points(text)
        wide = codes[np.flatnonzero(codes > 0xFF)]
        if len(wide) < len(codes) / 8:  # a few quotation marks in a text of Latin letters
            counts[:256] += _count_bytes(codes.astype(np.uint8)) - np.bincount(wide & 0xFF, minlength=256)
            codes = wide
        found = np.bincount(codes)
        counts[: len(found)] += found
    return {chr(code): int(counts[code]) for code in np.flatnonzero(counts)}


def _count_bytes(codes: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """How often each of 256 values occurs; two at a time, which is twice as fast."""
    odd = len(codes) % 2
    pairs = np.bincount(codes[odd:].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1)
    counts[codes[:odd]] += 1
    return counts


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class _SymbolCounter:
    """Encodes texts and counts their characters, bytes and hidden symbols."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hidden: Counter[str] = Counter()
        self._encode_batch = batch_encoder(tokenizer)
        self._after_word = False
        if tokenizer.level == "word":
            self._characters, self._bytes = (
                np.fromiter(map(len, symbols), dtype=np.int64, count=tokenizer.vocabulary_size)
                for symbols in (tokenizer.symbols, tokenizer.token_bytes)
            )
            self._characters[tokenizer.unknown_id] = self._bytes[tokenizer.unknown_id] = 0

    def encode(self, texts: list[str], encoded: EncodedText,
               ) -> tuple[list[NDArray[np.unsignedinteger[Any]]], list[int]]:  # fmt: skip
        """Ids of the texts in a row, in one array or several, and how many each text has; counts go to ``encoded``."""
        if self.tokenizer.level == "word":
            words = [split_words(text) for text in texts]
            return [self._encode_words([*chain.from_iterable(words)], encoded)], [*map(len, words)]
        characters = [*map(len, texts)]
        encoded.characters += sum(characters)
        parts = texts if len(texts) <= _FEW else ["".join(texts)]
        if self.tokenizer.level == "character":
            return [self._encode_characters(part, encoded) for part in parts], characters
        if self.tokenizer.level == "byte":
            arrays = self._encode_batch(parts)
            encoded.bytes += sum(map(len, arrays))
            return arrays, [*map(len, arrays)] if parts is texts else [*map(_bytes_of, texts)]
        encoded.bytes += sum(map(_bytes_of, texts))
        arrays = self._encode_batch(texts)
        return arrays, [*map(len, arrays)]

    def _encode_characters(self, text: str, encoded: EncodedText) -> NDArray[np.unsignedinteger[Any]]:
        codes = code_points(text)
        ids = self.tokenizer.ids_of_code_points(codes)
        self.hidden.update(text[place] for place in np.flatnonzero(ids == self.tokenizer.unknown_id))
        beyond = (0x80, 0x800, 0x10000)  # where UTF-8 needs another byte
        encoded.bytes += len(codes)
        if not text.isascii():
            encoded.bytes += sum(int(np.count_nonzero(codes >= border)) for border in beyond[: codes.itemsize])
        return ids

    def _encode_words(self, words: list[str], encoded: EncodedText) -> NDArray[np.unsignedinteger[Any]]:
        ids = self.tokenizer.ids_of_words(words)
        if not words:
            return ids
        unknown = [words[place] for place in np.flatnonzero(ids == self.tokenizer.unknown_id)]
        self.hidden.update(word for word in unknown if word != UNKNOWN)
        is_word = ids != self.tokenizer.start_id
        separators = int(np.count_nonzero(is_word[1:] & is_word[:-1])) + int(self._after_word and is_word[0])
        self._after_word = bool(is_word[-1])
        line_ends = len(ids) - int(np.count_nonzero(is_word))
        joined = "".join(unknown)
        beside = separators + line_ends * (1 - len(END_OF_LINE))
        encoded.characters += int(self._characters[ids].sum()) + len(joined) + beside
        encoded.bytes += int(self._bytes[ids].sum()) + len(joined.encode("utf-8")) + beside
        return ids


class _DocumentHasher:
    """One hash for each document: of its start, white space normalised, and its length."""

    def __init__(self, hashes: array[int]) -> None:
        self.hashes = hashes
        self._parts: list[str] = []
        self._length = 0

    def feed(self, text: str, starts: bool) -> None:
        if starts:
            self.end()
        if self._length < _HASHED:
            self._parts.append(text[: _HASHED - self._length])
        self._length += len(text)

    def end(self) -> None:
        words = _without_runs_of_space("".join(self._parts))
        if words:
            long = self._length if self._length > _HASHED else 0
            digest = hashlib.blake2b(words, digest_size=8, salt=long.to_bytes(8, "little"))
            self.hashes.append(int.from_bytes(digest.digest(), "little"))
        self._parts, self._length = [], 0


_ASCII_SPACE = bytes.maketrans(b"\t\n\v\f\r\x1c\x1d\x1e\x1f", b" " * 9)


def _without_runs_of_space(text: str) -> bytes:
    """The text in UTF-8 with one space wherever there is white space, and none at its ends."""
    if not text.isascii():
        return " ".join(text.split()).encode("utf-8", "surrogatepass")
    raw = text.encode("ascii").translate(_ASCII_SPACE).strip(b" ")
    return b" ".join(raw.split()) if b"  " in raw else raw
