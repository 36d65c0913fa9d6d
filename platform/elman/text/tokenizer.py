"""Tokenizer: text to ids and back, at the level of bytes, characters, words or byte pairs.

One class wraps a ``tokenizers.Tokenizer``, and everything about it is read back from that
library's own tokenizer.json. Nothing is an "added token", so a special string that somebody
types is text like any other. Bytes, characters and words are looked up in tables, which is
tens of times faster than the library and gives the same ids; byte pairs go through the library.

This module travels inside stand-alone models: it imports nothing of ours but the errors.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from elman.config.schema import Level
from elman.errors import DataError

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
BPE_VOCABULARY_SIZE = 4096

_LINE_END = re.compile("\r\n|\r|\n")
# Python's str.split() separators, spelled out: the library's own notion of white space lacks four of them.
_SPACE = "[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Smallest unsigned integer type that holds the ids below ``vocabulary_size``."""
    return np.dtype("u1" if vocabulary_size <= 1 << 8 else "<u2" if vocabulary_size <= 1 << 16 else "<u4")


def split_words(text: str) -> list[str]:
    """Words between white space, each line end being the word ``<eos>``, as in awd-lstm-lm (Merity et al. 2018)."""
    if "\r" in text:
        text = _LINE_END.sub("\n", text)
    return text.replace("\n", f" {END_OF_LINE} ").split()


def code_points(text: str) -> NDArray[np.unsignedinteger[Any]]:
    """Unicode code points of the text, one a character, in the smallest type that it takes to copy them at once."""
    try:
        return np.frombuffer(text.encode("latin-1"), dtype=np.uint8)
    except UnicodeEncodeError:
        pass
    units = text.encode("utf-16-le", "surrogatepass")
    if len(units) == 2 * len(text):
        return np.frombuffer(units, dtype="<u2")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Character {error.start} of the text is the lone surrogate {text[error.start]!r}, "
            "which is no Unicode character: remove it."
        ) from None


def _printable(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)
    return text if text.isprintable() else repr(text)[1:-1]


def _bytes_of_alphabet() -> dict[str, int]:
    """The printable stand-in for each byte that byte-level BPE uses (Radford et al. 2019), and its byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}


class Tokenizer:
    """Ids for text and text for ids.

    Attributes:
        level: What a token is.
        vocabulary_size: Output symbols V; ids lie in [0, V).
        start_id: Input that stands before the first token of a text. At word level it is
            ``<eos>``; elsewhere it is V, a row of the embedding that is never predicted.
        num_inputs: Rows in the embedding: V at word level, V + 1 elsewhere.
        unknown_id: Id of ``<unk>`` at character and word level; None where nothing is unknown.

    Source: byte-level BPE after Sennrich et al. (2016), arXiv:1508.07909, and Radford et al. (2019).
    """

    def __init__(self, inner: tokenizers.Tokenizer, text: str | None = None) -> None:
        self._inner = inner
        self._json = text or inner.to_str(pretty=True)
        self.level: Level = _level_of(inner)
        self._ids = _Ids(inner.get_vocab(with_added_tokens=False))
        self._tokens = sorted(self._ids, key=self._ids.__getitem__)
        self.vocabulary_size = len(self._tokens)
        self.unknown_id = self._ids.unknown = self._ids[UNKNOWN] if self.level in ("character", "word") else None
        self.start_id = self._ids[END_OF_LINE] if self.level == "word" else self.vocabulary_size
        self.num_inputs = max(self.vocabulary_size, self.start_id + 1)
        self.dtype = token_dtype(self.vocabulary_size)

    @classmethod
    def for_bytes(cls) -> Tokenizer:
        """Tokenizer whose ids are the 256 byte values."""
        inner = tokenizers.Tokenizer(models.BPE(vocab=_bytes_of_alphabet(), merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return cls(inner)

    @classmethod
    def from_characters(cls, counts: Mapping[str, int], vocabulary_size: int | None = None, min_count: int = 1,
                        ) -> Tokenizer:
        """Tokenizer of single characters: ``<unk>``, then the characters by falling count, ties by code point.

        Args:
            counts: How often each character occurs in the training text.
            vocabulary_size: Most symbols, ``<unk>`` included; None keeps all.
            min_count: Characters seen less often are left out.
        """
        vocabulary = _ranked(counts, [UNKNOWN], vocabulary_size, min_count)
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        return cls(inner)

    @classmethod
    def from_words(cls, counts: Mapping[str, int], vocabulary_size: int | None = None, min_count: int = 1) -> Tokenizer:
        """Tokenizer of words: ``<unk>``, ``<eos>``, then the words by falling count, ties by code point.

        Args:
            counts: How often each of ``split_words`` occurs in the training text.
            vocabulary_size: Most symbols, ``<unk>`` and ``<eos>`` included; None keeps all.
            min_count: Words seen less often are left out.
        """
        vocabulary = _ranked(counts, [UNKNOWN, END_OF_LINE], vocabulary_size, min_count)
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        inner.normalizer = normalizers.Replace(Regex("\r\n|\r|\n"), f" {END_OF_LINE} ")
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(_SPACE), "removed")
        return cls(inner)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocabulary_size: int | None = None) -> Tokenizer:
        """Tokenizer of byte pairs, merged by frequency in ``texts`` from the 256 bytes up to ``vocabulary_size``."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size or BPE_VOCABULARY_SIZE,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Restore from what ``to_json`` gave.

        Raises:
            DataError: If it is no tokenizer of ours.
        """
        try:
            return cls(tokenizers.Tokenizer.from_str(text), text)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"This is no tokenizer.json of elman: {str(error).splitlines()[0]}") from None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Restore from a tokenizer.json.

        Raises:
            DataError: If the file is missing or no tokenizer of ours.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the tokenizer cannot be read: {error}") from None
        try:
            return cls.from_json(text)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """Everything about this tokenizer, in the format of the ``tokenizers`` library."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` to a file."""
        Path(path).write_text(self._json, encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the JSON: equal fingerprints mean equal vocabularies."""
        return hashlib.sha256(self._json.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def symbols(self) -> list[str]:
        """Printable form of each id."""
        if self.level in ("byte", "bpe"):
            return [_printable(raw) for raw in self.token_bytes]
        if self.level == "character":
            return [UNKNOWN, *(_printable(token.encode("utf-8", "surrogatepass")) for token in self._tokens[1:])]
        return list(self._tokens)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """UTF-8 bytes that each id stands for; at word level without separators."""
        if self.level in ("byte", "bpe"):
            byte_of = _bytes_of_alphabet()
            return [bytes(byte_of[sign] for sign in token) for token in self._tokens]
        return [token.encode("utf-8", "surrogatepass") for token in self._tokens]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, each in [0, V). What the vocabulary lacks becomes ``unknown_id``.

        At word level a ``<unk>`` or ``<eos>`` in the text is that token, as in the field's corpora.

        Raises:
            DataError: If the text holds a lone surrogate, at byte or bpe level.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        """``encode`` as an array (tokens,) of ``dtype``."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger[Any]]]:
        """``encode_array`` of each text; byte pairs on all cores."""
        if self.level == "bpe":
            for text in texts:
                if not text.isascii():
                    _utf8(text)
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        if self.level == "word":
            return [self.ids_of_words(split_words(text)) for text in texts]
        if self.level == "character":
            return [self.ids_of_code_points(code_points(text)) for text in texts]
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def ids_of_words(self, words: Sequence[str]) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of words that ``split_words`` gave."""
        return np.fromiter(map(self._ids.__getitem__, words), dtype=self.dtype, count=len(words))

    def ids_of_code_points(self, codes: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of characters that ``code_points`` gave, at character level."""
        if self.dtype.itemsize == 1 and codes.itemsize == 1:
            return np.frombuffer(codes.tobytes().translate(self._latin_1_table), dtype=self.dtype)
        return self._table.take(codes, mode="clip")  # no code point lies beyond; it spares the check

    @cached_property
    def _table(self) -> NDArray[np.unsignedinteger[Any]]:
        """Id of every code point, at character level."""
        table = np.full(0x110000, self.unknown_id, dtype=self.dtype)
        for token, place in self._ids.items():
            if token != UNKNOWN:
                table[ord(token)] = place
        return table

    @cached_property
    def _latin_1_table(self) -> bytes:
        return self._table[:256].tobytes()

    def unknown_symbols(self, text: str) -> list[str]:
        """Distinct characters (words, at word level) that the vocabulary lacks, in order of appearance."""
        if self.unknown_id is None:
            return []
        found: Iterable[str] = split_words(text) if self.level == "word" else text
        return list(dict.fromkeys(symbol for symbol in found if symbol not in self._ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; invalid UTF-8 shows as U+FFFD. ``start_id`` is nothing, save at word level.

        At word level one space stands between words, and each ``<eos>`` is a line end.
        """
        decoder = self.decoder()
        return "".join([decoder.feed(token) for token in ids]) + decoder.flush()

    def decoder(self) -> StreamDecoder:
        """Decoder that takes one id at a time."""
        return StreamDecoder(self)


class _Ids(dict[str, int]):
    """Id of each token; ``unknown`` for what is none."""

    unknown: int | None = None

    def __missing__(self, token: str) -> int:
        if self.unknown is None:
            raise KeyError(token)
        return self.unknown


class StreamDecoder:
    """Decodes id by id and holds back what is not yet text; the pieces join to ``decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._after_word = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._feed: Callable[[int], str] = self._feed_word if tokenizer.level == "word" else self._feed_bytes

    def feed(self, token: int) -> str:
        """Text that this id completes; empty while a character is incomplete."""
        return self._feed(token)

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that never came whole."""
        return self._utf8.decode(b"", final=True)

    def _feed_word(self, token: int) -> str:
        if token == self._tokenizer.start_id:
            self._after_word = False
            return "\n"
        separator = " " if self._after_word else ""
        self._after_word = True
        return separator + self._tokenizer._tokens[token]

    def _feed_bytes(self, token: int) -> str:
        if token == self._tokenizer.start_id:
            return ""
        if self._tokenizer.level == "character":
            return self._tokenizer._tokens[token]
        return self._utf8.decode(self._tokenizer.token_bytes[token])


def _level_of(inner: tokenizers.Tokenizer) -> Level:
    """Level of a tokenizer, from the way that it cuts text."""
    splitter, model = inner.pre_tokenizer, inner.model
    match model, splitter, getattr(splitter, "use_regex", getattr(splitter, "behavior", None)):
        case models.BPE(), pre_tokenizers.ByteLevel(), False:
            return "byte"
        case models.BPE(), pre_tokenizers.ByteLevel(), True:
            return "bpe"
        case models.WordLevel(), pre_tokenizers.Split(), "isolated":
            return "character"
        case models.WordLevel(), pre_tokenizers.Split(), "removed":
            return "word"
    found = f"{type(model).__name__} over {type(splitter).__name__}"
    raise DataError(f"This is no tokenizer.json of elman, but {found}.")


def _ranked(counts: Mapping[str, int], specials: list[str], vocabulary_size: int | None, min_count: int,
            ) -> dict[str, int]:
    """Ids: the special tokens, then symbols by falling count, ties by code point."""
    def kept() -> Iterator[tuple[int, str]]:
        return ((-count, symbol) for symbol, count in counts.items() if count >= min_count and symbol not in specials)

    ranked = [symbol for _, symbol in sorted(kept())]
    if vocabulary_size is not None:
        ranked = ranked[: max(0, vocabulary_size - len(specials))]
    return {symbol: place for place, symbol in enumerate([*specials, *ranked])}
