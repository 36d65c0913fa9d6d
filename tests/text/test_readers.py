"""Readers: what a file gives, and how each kind of bad file is told."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elman.errors import DataError
from elman.text import readers
from elman.text.readers import _documents, in_batches, read_file


def pieces(path: Path, column: str = "text", separator: str | None = None, errors: str = "strict"):
    return [piece for batch in read_file(path, column, separator, errors) for piece in batch]


def text_of(path: Path, **settings) -> str:
    return "".join(text for text, _ in pieces(path, **settings))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert text_of(path) == "one\r\ntwo\rthree\n"


def test_a_character_over_the_border_of_blocks_stays_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 3)
    assert text_of(write(tmp_path / "a.txt", "aé€😀b".encode())) == "aé€😀b"


@pytest.mark.parametrize("block", [3, 5, 1 << 20])
def test_invalid_utf8_names_its_byte(tmp_path, monkeypatch, block) -> None:
    monkeypatch.setattr(readers, "BLOCK", block)
    with pytest.raises(DataError, match=r"a\.txt: byte 6 \(0xFF\) is not valid UTF-8.*corpus\.encoding_errors"):
        text_of(write(tmp_path / "a.txt", "aé€".encode() + b"\xff" + b"tail"))
    with pytest.raises(DataError, match="byte 3 "):  # cut short within a character
        text_of(write(tmp_path / "b.txt", b"abc\xe2\x82"))
    with pytest.raises(DataError, match="byte 5 "):
        text_of(write(tmp_path / "c.txt", b"\xef\xbb\xbfab\xff"))


def test_invalid_utf8_may_be_replaced_or_ignored(tmp_path) -> None:
    path = write(tmp_path / "a.txt", b"a\xffb")
    assert text_of(path, errors="replace") == "a\ufffdb"
    assert text_of(path, errors="ignore") == "ab"


def test_a_nul_byte_is_refused_with_its_offset(tmp_path) -> None:
    with pytest.raises(DataError, match="byte 5 is NUL"):
        text_of(write(tmp_path / "a.txt", b"hello\0world"))
    with pytest.raises(DataError, match="UTF-16, perhaps"):
        text_of(write(tmp_path / "b.txt", "hello".encode("utf-16-le")))


def test_gzip_is_read_and_damage_is_told(tmp_path) -> None:
    whole = gzip.compress(b"some text\n" * 1000)
    assert text_of(write(tmp_path / "a.txt.gz", whole)) == "some text\n" * 1000
    with pytest.raises(DataError, match="damaged or cut short"):
        text_of(write(tmp_path / "b.txt.gz", whole[:-20]))
    with pytest.raises(DataError, match="damaged or cut short"):
        text_of(write(tmp_path / "c.txt.gz", b"no gzip at all"))


def test_each_row_is_a_document_with_a_line_end(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n{"text": "two\\n", "more": 1}\n')
    assert pieces(path) == [("one\n", True), ("two\n", True)]
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(path.read_bytes()))
    assert pieces(packed) == pieces(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', r"a\.jsonl:2: is not JSON"),
        (b'{"body": "b", "id": 1}', r"a\.jsonl:2: has no column 'text': set corpus.column to one of body, id"),
        (b'{"text": 3}', r"a\.jsonl:2: column text: holds int, not text"),
        (b'["text"]', r"a\.jsonl:2: holds a JSON list"),
        (b'{"text": "a\xff"}', r"a\.jsonl:2: byte 11 of the line is not valid UTF-8"),
        (b'{"text": "a\\u0000"}', r"a\.jsonl:2: column text: holds a NUL"),
        (b'{"text": "a\\ud800"}', r"a\.jsonl:2: column text: character 1 is a lone surrogate"),
    ],
)
def test_a_bad_row_names_its_line(tmp_path, line: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        pieces(write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n"))


def test_another_column_can_be_named(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "b"}).encode())
    assert text_of(path, column="body") == "b\n"


@given(text=st.text("ab|"), cuts=st.lists(st.integers(0, 20)), separator=st.sampled_from(["|", "||", "ab|"]))
def test_documents_end_with_their_separator_wherever_blocks_end(text: str, cuts: list[int], separator: str) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    blocks = [text[a:b] for a, b in pairwise(borders)]
    documents: list[str] = []
    for part, starts in _documents(blocks, separator):
        documents.append("")
        if not starts:
            documents.pop()
        documents[-1] += part
    expected = [part + separator for part in text.split(separator)[:-1]] + [text.split(separator)[-1]]
    assert documents == [document for document in expected if document]


@given(texts=st.lists(st.text("ab", max_size=20)), size=st.integers(1, 10))
def test_batches_are_bounded_and_lose_nothing(texts: list[str], size: int) -> None:
    batches = list(in_batches([(text, True) for text in texts], size))
    assert "".join(text for batch in batches for text, _ in batch) == "".join(texts)
    assert sum(starts for batch in batches for _, starts in batch) == len(texts)
    assert all(sum(len(text) for text, _ in batch) < 2 * size for batch in batches)
