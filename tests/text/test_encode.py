"""Encoding in pieces gives the tokens of the whole text."""

import io
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.text import encode
from elman.text.encode import encode_stream, recut
from elman.text.readers import in_batches
from elman.text.spelling import SpellingModel
from elman.text.streams import RangeStream, SharedStream, count_characters
from elman.text.tokenizer import Tokenizer, split_words

messy = st.text(st.sampled_from("ab1. \n\r\t\u3000é'"), max_size=300)


@dataclass
class Texts:
    """A stream of given pieces."""

    pieces: list[tuple[str, bool]]
    size: int | None = None

    def batches(self):
        yield from ([piece] for piece in self.pieces)


def in_blocks(text: str, size: int) -> Texts:
    return Texts([(text[place : place + size], place == 0) for place in range(0, len(text), size)])


def encoded(stream, tokenizer: Tokenizer, counts=None):
    sink = io.BytesIO()
    spelling = SpellingModel.from_counts(counts or {})
    facts = encode_stream(stream, tokenizer, spelling, sink, lambda _: None, hash_documents=True)
    return np.frombuffer(sink.getvalue(), dtype=tokenizer.dtype).tolist(), facts


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["the cat's 11 mats.\n\n  a b. ab é" * 50, "a  b\n\n\nb"], 280)


@given(text=messy, size=st.integers(1, 12))
@settings(deadline=None)
def test_words_in_pieces_are_the_words_of_the_whole(text: str, size: int) -> None:
    tokenizer = Tokenizer.from_words(Counter(split_words(text)[::2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BLOCK", 320)  # beyond any word of the test
        tokens, facts = encoded(in_blocks(text, size), tokenizer)
    assert tokens == tokenizer.encode(text)
    assert facts.tokens == len(tokens)


@given(text=messy, size=st.integers(1, 12), piece=st.integers(2, 20))
@settings(deadline=None)
def test_byte_pairs_in_pieces_are_those_of_the_whole(bpe: Tokenizer, text: str, size: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_BPE_PIECE", piece)
        tokens, facts = encoded(in_blocks(text, size), bpe)
    assert tokens == bpe.encode(text)
    assert (facts.characters, facts.bytes) == (len(text), len(text.encode()))


@given(text=messy, size=st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_words_count_the_text_that_they_stand_for(text: str, size: int) -> None:
    tokenizer = Tokenizer.from_words(Counter(split_words(text)))
    tokens, facts = encoded(in_blocks(text, size), tokenizer)
    shown = tokenizer.decode(tokens)
    assert (facts.characters, facts.bytes) == (len(shown), len(shown.encode()))


def test_a_word_longer_than_a_block_is_torn_but_not_lost() -> None:
    text = "x" * 2_500_000 + " end\n"
    batches = list(recut(in_blocks(text, 1 << 20).batches(), "word"))
    assert "".join(part for batch in batches for part, _ in batch) == text
    assert max(len(part) for batch in batches for part, _ in batch) <= 1 << 20


@pytest.mark.parametrize("level", ["byte", "character", "word", "bpe"])
def test_documents_start_where_their_first_token_is(level: str, bpe: Tokenizer) -> None:
    documents = ["a b\n", "\u3000", "b é a\n", "a\n"]
    tokenizer = {
        "byte": Tokenizer.for_bytes(),
        "character": Tokenizer.from_characters(Counter("".join(documents))),
        "word": Tokenizer.from_words(Counter("ab")),
        "bpe": bpe,
    }[level]
    tokens, facts = encoded(Texts([(document, True) for document in documents]), tokenizer)
    starts, place = [], 0
    for document in documents:
        ids = tokenizer.encode(document)
        starts += [place] if ids else []
        place += len(ids)
    assert list(facts.document_starts) == starts
    assert len(tokens) == place


def test_what_unk_hides_is_charged_and_a_literal_unk_is_not() -> None:
    counts = {"aa": 2, "b": 1}
    tokenizer = Tokenizer.from_words(counts)
    tokens, facts = encoded(in_blocks("aa <unk> ab b ab\n", 100), tokenizer, counts)
    assert tokens.count(0) == 3
    assert (facts.unknown_tokens, facts.unknown_types) == (2, 1)
    # Signs of the training text: a 4, b 1, end 3; with 257 added ones that is 265 in all.
    one = np.log2(265 / 5) + np.log2(265 / 2) + np.log2(265 / 4)
    assert facts.unknown_bits == pytest.approx(2 * one)


def test_the_spelling_model_is_a_distribution() -> None:
    spelling = SpellingModel.from_counts(Counter(["hello", "wörld"]))
    assert np.exp2(-spelling.bits_of_sign).sum() == pytest.approx(1)


def test_unknown_characters_are_charged() -> None:
    counts = Counter("aab")
    _, facts = encoded(in_blocks("aéb", 10), Tokenizer.from_characters(counts), counts)
    assert facts.unknown_tokens == 1
    assert facts.unknown_bits == pytest.approx(2 * np.log2(263) + np.log2(263 / 4))


units = st.sampled_from(["characters", "bytes"])


@given(text=st.text("aé€😀"), size=st.integers(1, 5), border=st.integers(0, 40), unit=units)
def test_two_ranges_make_the_whole(text: str, size: int, border: int, unit) -> None:
    base = in_blocks(text, size)
    parts = [RangeStream(base, 0, border, unit), RangeStream(base, border, None, unit)]
    read = ["".join(piece for batch in part.batches() for piece, _ in batch) for part in parts]
    assert "".join(read) == text
    if unit == "characters":
        assert read[0] == text[:border]
    else:
        assert border <= len(read[0].encode()) < border + 4 or border > len(text.encode())
    for part, whole in zip(parts, read, strict=True):
        assert count_characters(part) == len(whole)
        assert [starts for batch in part.batches() for _, starts in batch][:1] == ([True] if whole else [])


@given(text=st.text("abc"), size=st.integers(1, 5), borders=st.lists(st.integers(0, 40), max_size=5))
def test_ranges_of_a_shared_stream_are_those_of_the_stream_in_any_order(text: str, size: int, borders) -> None:
    shared = SharedStream(in_blocks(text, size))
    for start in borders:
        for stop in (start + size, None):
            read = [piece for batch in RangeStream(shared, start, stop).batches() for piece, _ in batch]
            assert "".join(read) == text[start:stop]


def test_two_readers_of_a_shared_stream_do_not_disturb_each_other() -> None:
    shared = SharedStream(in_blocks("abcdef", 1))
    first, second = (RangeStream(shared, 1, 5).batches() for _ in range(2))
    read = [(next(first)[0][0], next(second)[0][0]) for _ in range(4)]
    assert read == [(letter, letter) for letter in "bcde"]


def test_the_ranges_of_a_text_in_order_read_it_once() -> None:
    reads = []

    class Watched(Texts):
        def batches(self):
            for batch in super().batches():
                reads.extend(text for text, _ in batch)
                yield batch

    shared = SharedStream(Watched([(letter, False) for letter in "abcdef"]))
    parts = [RangeStream(shared, start, stop) for start, stop in ((0, 2), (2, 3), (3, 6))]
    assert [count_characters(part) for part in parts] == [2, 1, 3]
    assert reads == list("abcdef")


@pytest.mark.parametrize("text", ["", " \n", "a", "a b", " a  b\n", "a\x1cb\x1d\x1e c\x1f", "\va\f\r\tb", "é\u3000 b "])
def test_white_space_is_normalised_as_split_does(text: str) -> None:
    assert encode._without_runs_of_space(text).decode() == " ".join(text.split())


@given(texts=st.lists(st.text("aé") | st.text("aéЖ世") | st.text("aЖ\U0001f600"), max_size=4))
def test_characters_are_counted_whatever_their_width(texts: list[str]) -> None:
    assert encode._count_characters(texts) == dict(sorted(Counter("".join(texts)).items()))
    tokenizer = Tokenizer.from_characters(Counter("aЖ"))
    for text in texts:
        tokens, facts = encoded(in_blocks(text, 3), tokenizer)
        assert tokens == tokenizer.encode(text) == [{"a": 1, "Ж": 2}.get(character, 0) for character in text]
        assert (facts.bytes, facts.characters) == (len(text.encode()), len(text))


class Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return len(data)


@pytest.mark.parametrize("level", ["byte", "character", "word", "bpe"])
@pytest.mark.parametrize("line_end", ["\n", " "])
def test_memory_does_not_grow_with_the_text(level: str, line_end: str, bpe: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(encode, "BLOCK", 1 << 12)
    monkeypatch.setattr(encode, "_HASHED", 1 << 12)
    monkeypatch.setattr(encode, "in_batches", partial(in_batches, size=1 << 12))
    verse = "the cat's mat\u2019s 11 a b, and the mat is é" + line_end
    tokenizer = {
        "byte": Tokenizer.for_bytes(),
        "character": Tokenizer.from_characters(Counter(verse)),
        "word": Tokenizer.from_words(Counter(split_words(verse))),
        "bpe": bpe,
    }[level]

    def peak(verses: int) -> int:
        pieces = ((verse, place == 0) for place in range(verses))
        tracemalloc.start()
        encode_stream(Texts(pieces), tokenizer, None, Nowhere(), lambda _: None, hash_documents=True)  # type: ignore[arg-type]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(200)  # tables are made
    assert peak(3000) < peak(500) + 20_000
