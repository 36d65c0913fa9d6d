"""Local corpora: which files are taken, how they are split, and how each mistake is told."""

import gzip
from pathlib import Path

import pytest

from elman.config.schema import CorpusConfig
from elman.errors import ConfigError, DataError
from elman.text.corpus import Corpus, open_corpus

TEXT = "".join(f"line {number} of the text\n" for number in range(100))


def read(corpus: Corpus) -> dict[str, str]:
    return {
        split: "".join(text for batch in stream.batches() for text, _ in batch)
        for split, stream in corpus.splits.items()
    }


def opened(name: object, **settings) -> dict[str, str]:
    return read(open_corpus(CorpusConfig(name=str(name), **settings)))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_one_file_is_cut_into_contiguous_ranges_of_characters(tmp_path) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT)
    splits = opened(path, validation_fraction=0.1, test_fraction=0.1)
    assert list(splits) == ["train", "validation", "test"]
    assert "".join(splits.values()) == TEXT
    assert len(TEXT) == 1990
    assert [len(text) for text in splits.values()] == [1592, 199, 199]


def test_the_customary_nine_to_one_split_is_exact(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 1_115_394)  # as long as tiny shakespeare
    splits = opened(path, validation_fraction=0.1, test_fraction=0.0)
    assert {split: len(text) for split, text in splits.items()} == {"train": 1_003_854, "validation": 111_540}


def test_file_names_tell_the_official_splits(tmp_path) -> None:
    write(tmp_path, **{"set_dot_train_dot_txt": "a b\n", "set_dot_valid_dot_txt": "c\n", "set_dot_test_dot_txt": "d\n"})
    expected = {"train": "a b\n", "validation": "c\n", "test": "d\n"}
    assert opened(tmp_path) == expected
    assert opened(f"{tmp_path}/set.*") == expected


def test_official_splits_without_a_test_have_none(tmp_path) -> None:
    write(tmp_path, train_dot_txt="a b\n", dev_dot_txt="c\n")
    assert list(opened(tmp_path)) == ["train", "validation"]


def test_official_splits_without_a_validation_get_one_cut_off_training(tmp_path) -> None:
    write(tmp_path, train_dot_txt=TEXT, test_dot_txt="d\n")
    splits = opened(tmp_path, validation_fraction=0.25)
    assert splits["train"] + splits["validation"] == TEXT
    assert len(splits["train"]) == int(len(TEXT) * 0.75)
    assert splits["test"] == "d\n"


def test_settings_name_the_validation_and_test_files(tmp_path) -> None:
    write(tmp_path, text="a b\n", other="c\n", third="d\n")
    splits = opened(tmp_path / "text", validation_file=str(tmp_path / "other"), test_file=str(tmp_path / "third"))
    assert splits == {"train": "a b\n", "validation": "c\n", "test": "d\n"}


def test_a_directory_takes_its_data_files_in_order_and_says_what_it_left(tmp_path) -> None:
    write(tmp_path, b_dot_txt="second\n", a__c_dot_txt="first\n", notes_dot_md="notes\n", _dot_hidden_dot_txt="no\n")
    corpus = open_corpus(CorpusConfig(name=str(tmp_path)))
    assert "".join(read(corpus).values()) == "first\nsecond\n"
    assert "left out 1 others" in corpus.warnings[0]


def test_a_directory_of_source_code_takes_every_text(tmp_path) -> None:
    write(tmp_path, train_dot_py="train = 1\n", tests__test_train_dot_py="assert train\n")
    (tmp_path / "data.bin").write_bytes(b"\0\1\2")
    assert "".join(opened(tmp_path).values()) == "assert train\ntrain = 1\n"


def test_each_file_and_each_part_between_separators_is_a_document(tmp_path) -> None:
    write(tmp_path, a_dot_txt="one<end>two<end>", b_dot_txt="three")
    config = CorpusConfig(name=str(tmp_path), document_separator="<end>", validation_file=str(tmp_path / "a.txt"))
    pieces = [piece for batch in open_corpus(config).splits["validation"].batches() for piece in batch]
    assert pieces == [("one<end>", True), ("two<end>", True)]


def test_rows_of_parquet_and_jsonl_are_documents(tmp_path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": [1, 2], "body": ["one", "two\n"]}), tmp_path / "train.parquet")
    write(tmp_path, valid_dot_jsonl='{"body": "three"}\n')
    corpus = open_corpus(CorpusConfig(name=str(tmp_path), column="body"))
    pieces = [piece for batch in corpus.splits["train"].batches() for piece in batch]
    assert pieces == [("one\n", True), ("two\n", True)]
    assert read(corpus)["validation"] == "three\n"
    with pytest.raises(DataError, match=r"train\.parquet: has no column 'text': set corpus\.column to one of id, body"):
        opened(tmp_path / "train.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        opened(tmp_path / "bad.parquet")


def test_the_digest_of_one_file_is_its_sha256(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    corpus = open_corpus(CorpusConfig(name=str(path)))
    assert corpus.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert open_corpus(CorpusConfig(name=str(path), validation_file=str(path))).digest != corpus.digest


def test_a_missing_path_suggests_what_is_there(tmp_path) -> None:
    write(tmp_path, shakespeare_dot_txt="a\n")
    with pytest.raises(DataError, match=r"corpus\.name: .*shakespear\.txt.* Did you mean .*/shakespeare\.txt\?"):
        open_corpus(CorpusConfig(name=str(tmp_path / "shakespear.txt")))
    with pytest.raises(DataError, match="Did you mean wikitext-2"):
        open_corpus(CorpusConfig(name="wikitext2"))
    with pytest.raises(DataError, match=r"corpus\.validation_file: .*nowhere"):
        open_corpus(CorpusConfig(name=str(tmp_path), validation_file="nowhere"))


def test_nothing_to_read_is_told_at_once(tmp_path) -> None:
    write(tmp_path, empty_dot_txt="")
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        open_corpus(CorpusConfig(name=str(tmp_path / "empty.txt")))
    with pytest.raises(DataError, match="no file matches"):
        open_corpus(CorpusConfig(name=f"{tmp_path}/*.jsonl"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no text file"):
        open_corpus(CorpusConfig(name=str(tmp_path / "none")))


def test_a_blank_text_is_refused(tmp_path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    with pytest.raises(DataError, match=r"blank\.txt: holds nothing but white space"):
        opened(tmp_path / "blank.txt")


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({"split": "train"}, "split"), ({"config": "x"}, "config"), ({"revision": "x"}, "revision")],
)
def test_settings_of_the_hub_are_refused_for_a_file(tmp_path, settings, setting) -> None:
    write(tmp_path, a_dot_txt="a\n")
    with pytest.raises(ConfigError, match=rf"corpus\.{setting} does not apply"):
        open_corpus(CorpusConfig(name=str(tmp_path), **settings))


def test_a_compressed_file_reads_like_the_plain_one(tmp_path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert "".join(opened(tmp_path / "a.txt.gz").values()) == TEXT


def test_the_bible_is_split_within_each_book() -> None:
    corpus = open_corpus(CorpusConfig(name="bible-asv"))
    documents = {
        split: [text for batch in stream.batches() for text, _ in batch] for split, stream in corpus.splits.items()
    }
    assert len(documents["train"]) == 66
    sizes = {split: sum(map(len, texts)) for split, texts in documents.items()}
    assert sum(sizes.values()) == 4_150_340
    assert sizes["train"] / 4_150_340 == pytest.approx(0.9, abs=0.001)
    assert documents["train"][0].startswith("In the beginning")
    assert documents["test"][-1].endswith("Amen.\n")
    assert list(open_corpus(CorpusConfig(name="bible-asv", test_fraction=0.0)).splits) == ["train", "validation"]


def test_python_docs_are_one_document_a_topic() -> None:
    from pydoc_data.topics import topics

    corpus = open_corpus(CorpusConfig(name="python-docs"))
    assert sum(len(text) for text in read(corpus).values()) >= sum(map(len, topics.values()))
    starts = [starts for stream in corpus.splits.values() for batch in stream.batches() for _, starts in batch]
    assert len(topics) <= sum(starts) <= len(topics) + 2
