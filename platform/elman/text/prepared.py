"""Prepared corpora: token files on disk, and what is known about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elman.config.schema import Level
from elman.text.encode import batch_encoder, recut
from elman.text.spelling import SpellingModel
from elman.text.streams import Stream
from elman.text.tokenizer import Tokenizer

_CHUNK = 1 << 22  # tokens counted at once
_SAMPLE = 300  # characters
_MOST_FREQUENT = 20


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """One split as a file of tokens.

    Attributes:
        path: Raw little-endian ids, ``dtype`` each.
        tokens: Length of the split in tokens.
        characters: Those of the text that the tokens stand for: the original, save at word level,
            where it is the words with one separator between any two.
        bytes: The same in UTF-8.
        unknown_tokens: ``<unk>`` tokens that hide a symbol; one that stands in the text itself is none.
        unknown_types: Distinct symbols so hidden.
        unknown_bits: Bits that spell what they hide (see elman.text.spelling).
        document_starts: Token index at which each document starts (documents,), int64.
    """

    path: Path
    dtype: np.dtype[Any]
    tokens: int
    characters: int
    bytes: int
    unknown_tokens: int
    unknown_types: int
    unknown_bits: float
    document_starts: NDArray[np.int64] = field(repr=False)

    @property
    def documents(self) -> int:
        """Documents in the split."""
        return len(self.document_starts)

    def open(self) -> np.memmap[Any, Any]:
        """The tokens (tokens,), mapped read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    def part(self, tokens: int) -> PreparedSplit:
        """The first so many tokens; its characters and bytes are the whole's share, not counted anew."""
        share = tokens / self.tokens
        return replace(
            self,
            tokens=tokens,
            characters=round(self.characters * share),
            bytes=round(self.bytes * share),
            unknown_tokens=round(self.unknown_tokens * share),
            unknown_bits=self.unknown_bits * share,
            document_starts=self.document_starts[: int(np.searchsorted(self.document_starts, tokens))],
        )

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits that a model of this mean loss spends on a byte of UTF-8, what ``<unk>`` hides included."""
        return self._bits(nats_per_token) / self.bytes

    def bits_per_character(self, nats_per_token: float) -> float:
        """Bits that a model of this mean loss spends on a character, what ``<unk>`` hides included."""
        return self._bits(nats_per_token) / self.characters

    def _bits(self, nats_per_token: float) -> float:
        return nats_per_token * self.tokens / log(2) + self.unknown_bits


class TokenPiece(NamedTuple):
    """Contiguous tokens, and whether a document starts with them."""

    tokens: NDArray[np.unsignedinteger[Any]]
    starts_document: bool


@dataclass(frozen=True, kw_only=True)
class StreamedSplit:
    """A training split that is read and encoded on the fly; its length is not known."""

    stream: Stream = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    dtype: np.dtype[Any]
    tokens: None = None

    def pieces(self) -> Iterator[TokenPiece]:
        """The tokens piece by piece, from the start of the text at each call."""
        encode = batch_encoder(self.tokenizer)
        begins = False  # a document may begin with a piece of mere white space, which has no words
        for batch in recut(self.stream.batches(), self.tokenizer.level):
            arrays = encode([text for text, _ in batch])
            for (_, starts), ids in zip(batch, arrays, strict=True):
                begins = begins or starts
                if len(ids):
                    yield TokenPiece(ids, begins)
                    begins = False


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A corpus ready to train on.

    Attributes:
        digest: SHA-256 of the content; comparisons hold only where digests agree.
        splits: ``train``, ``validation`` and, where there is one, ``test``.
        shared_documents: For ``train/validation``, ``train/test`` and ``validation/test``: how many
            documents of the second occur word for word in the first.
        spelling: What symbols outside the vocabulary cost; None where every symbol is inside.
        directory: Where the files lie.
        warnings: What the user should know.
    """

    name: str
    source: str
    citation: str
    digest: str
    level: Level
    tokenizer: Tokenizer = field(repr=False)
    splits: Mapping[str, PreparedSplit | StreamedSplit]
    shared_documents: Mapping[str, int]
    spelling: SpellingModel | None = field(repr=False)
    directory: Path
    warnings: list[str]


def describe(prepared: PreparedCorpus) -> dict[str, Any]:
    """What a corpus holds, as plain values: sizes, vocabulary, coverage, most frequent tokens and a sample.

    Coverage is that of the validation split by the training vocabulary: the share of its tokens,
    and of its distinct tokens, that occur in the training split (in the vocabulary, where training
    is streamed).
    """
    tokenizer, train = prepared.tokenizer, prepared.splits["train"]
    splits = {name: _sizes(split) for name, split in prepared.splits.items()}
    if isinstance(train, StreamedSplit):
        first = np.concatenate([piece.tokens for piece in islice(train.pieces(), 1)] or [np.zeros(0, train.dtype)])
        counts = np.bincount(first, minlength=tokenizer.vocabulary_size)
        seen = np.ones(tokenizer.vocabulary_size, dtype=bool)
    else:
        first = train.open()[: 4 * _SAMPLE]
        counts = _count_tokens(train, tokenizer.vocabulary_size)
        seen = counts > 0
    frequent = [int(token) for token in np.argsort(-counts, kind="stable")[:_MOST_FREQUENT] if counts[token]]
    return {
        "name": prepared.name,
        "source": prepared.source,
        "citation": prepared.citation,
        "digest": prepared.digest,
        "level": prepared.level,
        "vocabulary_size": tokenizer.vocabulary_size,
        "splits": splits,
        "coverage": _coverage(prepared, seen),
        "most_frequent": [{"token": tokenizer.symbols[token], "count": int(counts[token])} for token in frequent],
        "shared_documents": dict(prepared.shared_documents),
        "sample": tokenizer.decode(first[: 4 * _SAMPLE].tolist())[:_SAMPLE],
        "warnings": list(prepared.warnings),
    }


def _sizes(split: PreparedSplit | StreamedSplit) -> dict[str, int | float | None]:
    names = ("bytes", "characters", "tokens", "documents", "unknown_tokens")
    return {name: getattr(split, name, None) for name in names}


def _count_tokens(split: PreparedSplit, vocabulary_size: int) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.zeros(vocabulary_size, dtype=np.int64)
    tokens = split.open()
    for place in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[place : place + _CHUNK], minlength=vocabulary_size)
    return counts


def _coverage(prepared: PreparedCorpus, seen: NDArray[np.bool_]) -> dict[str, float]:
    validation = prepared.splits["validation"]
    assert isinstance(validation, PreparedSplit)
    counts = _count_tokens(validation, prepared.tokenizer.vocabulary_size)
    unknown = prepared.tokenizer.unknown_id
    if unknown is not None:
        counts[unknown] -= validation.unknown_tokens  # what is left stood in the text
        seen = seen.copy()
        seen[unknown] = True
    types = int(np.count_nonzero(counts)) + validation.unknown_types
    known = counts * seen
    return {"tokens": float(known.sum() / validation.tokens), "types": float(np.count_nonzero(known) / types)}
