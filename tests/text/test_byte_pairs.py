"""The table of parts gives the ids that the library gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.errors import DataError
from elman.text import byte_pairs
from elman.text.byte_pairs import BytePairTable, short_runs
from elman.text.tokenizer import Tokenizer

WORDS = ["a", "ab", "b.", "'s", "11", "é", "世界", "\U0001f600", "\x1c", "\x85", "\0"]
SPACES = ["", " ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\u3000"]
running = st.lists(st.sampled_from(WORDS) | st.sampled_from(SPACES), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(["a ab's 11 b.\n\n  a\tb. ab é\r\n 世界  \n" * 50], 300)


@given(batches=st.lists(st.lists(running, max_size=3), max_size=4), most=st.integers(0, 30), pause=st.integers(0, 1))
@settings(deadline=None, max_examples=300)
def test_looked_up_ids_are_the_librarys(tokenizer: Tokenizer, batches, most: int, pause: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_pairs, "_MOST_PARTS", most)
        patch.setattr(byte_pairs, "_PAUSE", pause)
        table = BytePairTable(tokenizer)
        for texts in batches:
            expected = [tokenizer.encode(text) for text in texts]
            assert [ids.tolist() for ids in table.encode_batch(texts)] == expected
            assert all(ids.dtype == tokenizer.dtype for ids in table.encode_batch(texts))


def test_a_part_is_encoded_once(tokenizer: Tokenizer, monkeypatch) -> None:
    asked: list[str] = []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: asked.extend(texts) or encode(texts))
    monkeypatch.setattr(byte_pairs, "_PAUSE", 0)
    table = BytePairTable(tokenizer)
    for _ in range(2):
        table.encode_batch(["a ab a\nab b. a", "b. ab  a"])
    assert sorted(asked) == sorted(["a", " ab", " a\n", "ab", " b.", " a", "b.", " ab  a"])


def test_what_does_not_repeat_itself_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    table = BytePairTable(tokenizer)
    table.encode_batch([" ".join(map(str, range(1000)))])
    learned = len(table._parts)
    table.encode_batch(["never seen before"])
    assert len(table._parts) == learned


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        BytePairTable(tokenizer).encode_batch(["a \ud800 b"])


def test_the_table_forgets_before_it_grows_large(tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(byte_pairs, "_MOST_PARTS", 100)
    monkeypatch.setattr(byte_pairs, "_PAUSE", 0)
    table = BytePairTable(tokenizer)
    for batch in range(20):
        table.encode_batch([" ".join(f"{batch}a{number}" for number in range(50))])
        assert len(table._parts) <= 100 + 50
        assert len(table._length) == len(table._begin) == len(table._parts)


@pytest.mark.parametrize("text", ["x" * 5000, " " * 5000, "=" * 5000, "a b " * 10 + "7" * 5000, "a1." * 10_000])
def test_what_goes_on_and_on_is_learned_in_short_pieces(text: str) -> None:
    pieces = list(short_runs([text]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 256


def test_little_is_learned_of_what_goes_on_and_on(monkeypatch) -> None:
    monkeypatch.setattr(byte_pairs, "_TAUGHT", 1)
    assert "".join(short_runs(["x" * 5000, "y" * 5000, "a b"])) == "x" * 5000 + "a b"


@pytest.mark.parametrize("text", ["the cat.\n" * 500, "天地玄黃，宇宙洪荒。" * 300, "a1b2" * 1000, "a  b\n\n" * 1000])
def test_running_text_of_any_script_is_learned_from_as_it_is(text: str) -> None:
    assert list(short_runs([text])) == [text]
