"""Tokenizers: round trips, order of the vocabulary, what is unknown, and what a file restores."""

from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.errors import DataError
from elman.text.tokenizer import Tokenizer, split_words

LINE_BREAKS = "a\nb\r\nc\rd\u2028e\u2029f\x85g\x0bh\x0ci\n\n\r\r\n"
ENGLISH = "the cat sat on the mat.\nthe dog sat on the log.\n" * 20
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab \n\r\té\u2028\U0001f600")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([ENGLISH], 300)


def every_level(bpe: Tokenizer) -> list[Tokenizer]:
    words = Tokenizer.from_words(Counter(split_words(ENGLISH)))
    return [Tokenizer.for_bytes(), Tokenizer.from_characters(Counter(ENGLISH)), words, bpe]


@given(text=texts)
def test_bytes_return_any_text_exactly(text: str) -> None:
    tokenizer = Tokenizer.for_bytes()
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=texts)
@settings(deadline=None)
def test_byte_pairs_return_any_text_exactly(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@given(text=texts)
@settings(deadline=None, max_examples=30)
def test_characters_return_a_text_of_their_vocabulary_exactly(text: str) -> None:
    tokenizer = Tokenizer.from_characters(Counter(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unknown_id not in tokenizer.encode(text)


@given(text=texts)
@settings(deadline=None, max_examples=30)
def test_words_return_a_text_but_for_its_white_space(text: str) -> None:
    tokenizer = Tokenizer.from_words(Counter(split_words(text)))
    assert split_words(tokenizer.decode(tokenizer.encode(text))) == split_words(text)


def test_line_breaks_of_every_kind_survive(bpe: Tokenizer) -> None:
    for tokenizer in (Tokenizer.for_bytes(), Tokenizer.from_characters(Counter(LINE_BREAKS)), bpe):
        assert tokenizer.decode(tokenizer.encode(LINE_BREAKS)) == LINE_BREAKS


@given(text=texts)
@settings(deadline=None, max_examples=50)
def test_table_look_up_equals_the_library(text: str) -> None:
    for tokenizer in (
        Tokenizer.for_bytes(),
        Tokenizer.from_characters(Counter(text[: len(text) // 2])),
        Tokenizer.from_words(Counter(split_words(text)[::2])),
    ):
        inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        assert tokenizer.encode(text) == inner.encode(text).ids


def test_a_file_restores_everything(bpe: Tokenizer, tmp_path) -> None:
    for tokenizer in every_level(bpe):
        tokenizer.save(tmp_path / "tokenizer.json")
        restored = Tokenizer.load(tmp_path / "tokenizer.json")
        for fact in ("level", "vocabulary_size", "num_inputs", "start_id", "unknown_id", "symbols", "fingerprint"):
            assert getattr(restored, fact) == getattr(tokenizer, fact), fact
        assert restored.encode(ENGLISH + "zebra") == tokenizer.encode(ENGLISH + "zebra")


def test_start_is_a_row_of_its_own_save_at_word_level(bpe: Tokenizer) -> None:
    for tokenizer in every_level(bpe):
        if tokenizer.level == "word":
            assert tokenizer.symbols[tokenizer.start_id] == "<eos>"
            assert tokenizer.num_inputs == tokenizer.vocabulary_size
        else:
            assert tokenizer.start_id == tokenizer.vocabulary_size == tokenizer.num_inputs - 1
            assert tokenizer.decode([tokenizer.start_id]) == ""


def test_characters_are_ranked_by_count_then_code_point() -> None:
    tokenizer = Tokenizer.from_characters(Counter("zzyybbbca"))
    assert tokenizer.symbols == ["<unk>", "b", "y", "z", "a", "c"]
    assert tokenizer.unknown_id == 0


def test_limits_keep_the_most_frequent() -> None:
    counts = Counter(split_words("a a a b b c\n"))
    assert Tokenizer.from_words(counts, vocabulary_size=4).symbols == ["<unk>", "<eos>", "a", "b"]
    assert Tokenizer.from_words(counts, min_count=3).symbols == ["<unk>", "<eos>", "a"]


def test_special_strings_typed_into_a_text_are_plain_characters(bpe: Tokenizer) -> None:
    text = "<unk><eos>"
    for tokenizer in (Tokenizer.for_bytes(), Tokenizer.from_characters(Counter(text)), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text)


def test_a_literal_unk_is_the_unknown_word() -> None:
    tokenizer = Tokenizer.from_words(Counter(split_words("the <unk> cat\n")))
    assert tokenizer.encode("the <unk> zebra") == [tokenizer.encode("the")[0], 0, 0]
    assert tokenizer.unknown_symbols("the <unk> zebra ox zebra") == ["zebra", "ox"]


def test_every_kind_of_line_end_is_one_eos() -> None:
    tokenizer = Tokenizer.from_words(Counter(split_words("a b\n")))
    assert tokenizer.decode(tokenizer.encode("a\r\nb\ra  \t b\n\n")) == "a\nb\na b\n\n"


def test_unknown_characters_are_named_once_in_order() -> None:
    tokenizer = Tokenizer.from_characters(Counter("abc"))
    assert tokenizer.unknown_symbols("azbyz") == ["z", "y"]
    assert tokenizer.encode("azb") == [1, 0, 2]
    assert Tokenizer.for_bytes().unknown_symbols("é") == []


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_streamed_pieces_join_to_the_decoded_text(bpe: Tokenizer, data) -> None:
    for tokenizer in every_level(bpe):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=30))
        decoder = tokenizer.decoder()
        assert "".join(decoder.feed(token) for token in ids) + decoder.flush() == tokenizer.decode(ids)


def test_a_decoder_holds_back_half_a_character() -> None:
    decoder = Tokenizer.for_bytes().decoder()
    first, second = "é".encode()
    assert (decoder.feed(first), decoder.feed(second), decoder.flush()) == ("", "é", "")
    assert decoder.feed(first) == ""
    assert decoder.flush() == "\ufffd"


def test_byte_pair_training_is_deterministic() -> None:
    fingerprints = {Tokenizer.train_bpe([ENGLISH], 290).fingerprint for _ in range(3)}
    assert len(fingerprints) == 1


def test_byte_pairs_without_any_merge_are_still_byte_pairs() -> None:
    tokenizer = Tokenizer.train_bpe(["ab"], 300)
    assert (tokenizer.level, tokenizer.vocabulary_size) == ("bpe", 256)
    assert Tokenizer.from_json(tokenizer.to_json()).level == "bpe"


def test_ids_take_the_smallest_type() -> None:
    assert Tokenizer.for_bytes().encode_array("a").dtype == np.uint8
    assert Tokenizer.from_characters({chr(0x4E00 + i): 1 for i in range(255)}).encode_array("a").dtype == np.uint8
    assert Tokenizer.from_characters({chr(0x4E00 + i): 1 for i in range(256)}).encode_array("a").dtype == np.uint16


def test_a_lone_surrogate_is_refused_or_unknown(bpe: Tokenizer) -> None:
    for tokenizer in (Tokenizer.for_bytes(), bpe):
        with pytest.raises(DataError, match="Character 1 of the text is the lone surrogate"):
            tokenizer.encode("a\ud800")
    characters = Tokenizer.from_characters(Counter("ab"))
    assert characters.encode("a\ud800") == [1, 0]


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: This is no tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "missing.json")
