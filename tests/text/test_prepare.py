"""Prepared corpora: tokens, counts, bits, streaming and the description."""

from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest

from elman.config.schema import CorpusConfig
from elman.errors import DataError
from elman.text.prepare import prepare
from elman.text.prepared import PreparedSplit, StreamedSplit, describe

TEXT = "".join(f"line {number} of the naïve text\r\n" for number in range(300))


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return CorpusConfig(name=str(path))


@pytest.mark.parametrize("level", ["byte", "character", "bpe"])
def test_the_splits_hold_the_whole_text_exactly(config, tmp_path, level) -> None:
    prepared = prepare(replace(config, level=level), tmp_path / "cache")
    texts = [prepared.tokenizer.decode(split.open().tolist()) for split in prepared.splits.values()]
    if level == "character":  # digits that only later lines hold would be unknown; all ten occur early
        assert prepared.splits["test"].unknown_tokens == 0
    assert "".join(texts) == TEXT
    for text, split in zip(texts, prepared.splits.values(), strict=True):
        assert (split.characters, split.bytes) == (len(text), len(text.encode()))
        assert split.tokens == len(split.open())
        assert split.document_starts.tolist() == [0]


def test_the_token_file_is_mapped_read_only_in_the_smallest_type(config, tmp_path) -> None:
    split = prepare(config, tmp_path / "cache").splits["train"]
    tokens = split.open()
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint8
    assert split.path.stat().st_size == split.tokens
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_the_vocabulary_comes_from_the_training_split_alone(tmp_path) -> None:
    for name, text in (("train", "a b a\n"), ("valid", "a z\n"), ("test", "q b\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    prepared = prepare(CorpusConfig(name=str(tmp_path), level="word"), tmp_path / ".cache")
    assert prepared.tokenizer.symbols == ["<unk>", "<eos>", "a", "b"]
    assert [split.unknown_tokens for split in prepared.splits.values()] == [0, 1, 1]
    assert prepared.splits["validation"].unknown_bits > 0


def test_bits_per_byte_charge_the_loss_and_what_unk_hides() -> None:
    split = PreparedSplit(
        path=Path("none"), dtype=np.dtype("u1"), tokens=10, characters=40, bytes=50, unknown_tokens=1, unknown_types=1,
        unknown_bits=25.0, document_starts=np.zeros(1, dtype=np.int64),
    )  # fmt: skip
    assert split.bits_per_byte(log(2)) == pytest.approx((10 + 25) / 50)
    assert split.bits_per_character(log(2)) == pytest.approx((10 + 25) / 40)


def test_a_uniform_model_costs_eight_bits_a_byte(config, tmp_path) -> None:
    split = prepare(replace(config, level="byte"), tmp_path / "cache").splits["test"]
    assert split.bits_per_byte(log(256)) == pytest.approx(8)


def test_documents_shared_between_splits_are_counted_and_warned_of(tmp_path) -> None:
    documents = ["one of them\n", "two   of\tthem\n", "\n", "four\n"]
    (tmp_path / "train.txt").write_text("|".join(documents))
    (tmp_path / "valid.txt").write_text("|".join(["two of them\n", "five\n", " \n"]))
    prepared = prepare(CorpusConfig(name=str(tmp_path), document_separator="|"), tmp_path / ".cache")
    assert prepared.shared_documents == {"train/validation": 1}
    assert "1 of the 2 documents of validation also stand in train" in prepared.warnings[0]


def test_a_split_that_would_be_empty_is_refused(tmp_path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"the validation split is empty .*raise corpus\.validation_fraction"):
        prepare(CorpusConfig(name=str(tmp_path / "short.txt")), tmp_path / "cache")


def test_progress_rises_in_every_stage(config, tmp_path) -> None:
    told: list[tuple[str, float]] = []
    prepare(config, tmp_path / "cache", lambda stage, fraction: told.append((stage, fraction)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["opening", "vocabulary", "train", "validation", "test"]
    for stage in ("vocabulary", "train"):
        fractions = [fraction for name, fraction in told if name == stage]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


@pytest.mark.parametrize("level", ["byte", "character", "word", "bpe"])
def test_a_streamed_training_split_gives_the_same_tokens_at_each_call(config, tmp_path, level) -> None:
    streamed = replace(config, level=level, streaming=True, streaming_sample=2000, validation_fraction=0.1)
    prepared = prepare(streamed, tmp_path / "cache")
    train = prepared.splits["train"]
    assert isinstance(train, StreamedSplit)
    assert train.tokens is None
    first = np.concatenate([piece.tokens for piece in train.pieces()])
    assert first.tolist() == np.concatenate([piece.tokens for piece in train.pieces()]).tolist()
    assert first.dtype == train.dtype
    assert next(train.pieces()).starts_document
    text = prepared.tokenizer.decode(first.tolist())
    if level != "word":
        expected = TEXT[:1700] + TEXT[2000:]
        assert text == expected or level == "character"  # a character beyond the sample may be unknown
        assert prepared.splits["validation"].characters == 200
        assert prepared.splits["test"].characters == 100


def test_official_splits_of_a_stream_are_capped_with_a_warning(tmp_path) -> None:
    for name, size in (("train", 100), ("valid", 100), ("test", 10)):
        (tmp_path / f"{name}.txt").write_text(TEXT[: 25 * size])
    config = CorpusConfig(name=str(tmp_path), streaming=True, streaming_sample=1000)
    prepared = prepare(config, tmp_path / ".cache")
    assert prepared.splits["validation"].characters == 1000
    assert prepared.splits["test"].characters == 250
    assert [warning for warning in prepared.warnings if "capped" in warning] == [
        "validation was capped at corpus.streaming_sample, 1,000 characters."
    ]


def test_the_description_counts_covers_and_samples(tmp_path) -> None:
    (tmp_path / "train.txt").write_text("a a a b <unk>\n" * 10)
    (tmp_path / "valid.txt").write_text("a z z <unk>\n")
    prepared = prepare(CorpusConfig(name=str(tmp_path), level="word"), tmp_path / ".cache")
    facts = describe(prepared)
    assert facts["vocabulary_size"] == 4
    assert facts["splits"]["train"]["tokens"] == 60
    assert facts["most_frequent"][0] == {"token": "a", "count": 30}
    assert facts["coverage"] == {"tokens": 3 / 5, "types": 3 / 4}
    assert facts["sample"].startswith("a a a b <unk>\na a")
    assert len(facts["sample"]) <= 300


def test_a_streamed_corpus_is_described_by_what_is_on_disk(config, tmp_path) -> None:
    facts = describe(prepare(replace(config, streaming=True, streaming_sample=2000), tmp_path / "cache"))
    assert facts["splits"]["train"]["tokens"] is None
    assert facts["sample"] == TEXT[:300]


@pytest.mark.parametrize("level", ["byte", "character", "word"])
def test_a_text_of_one_repeated_symbol_is_refused(tmp_path, level) -> None:
    path = tmp_path / "monotonous.txt"
    path.write_text("a " * 4000 if level == "word" else "a" * 4000)
    with pytest.raises(DataError, match="nothing but 'a', repeated"):
        prepare(CorpusConfig(name=str(path), level=level), tmp_path / "cache")


def _splits(path: Path, cache: Path, **settings: object) -> dict[str, str]:
    prepared = prepare(CorpusConfig(name=str(path), **settings), cache=cache)  # type: ignore[arg-type]
    return {name: prepared.tokenizer.decode(split.open().tolist()) for name, split in prepared.splits.items()}


def test_folds_are_contiguous_blocks_with_a_gap_and_each_character_is_held_out_once(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))  # every character tells its place
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    held = ""
    for fold in range(3):
        splits = _splits(
            path, tmp_path, level="byte", folds=3, fold=fold, fold_gap=10, test_fraction=0.1, validation_fraction=0.2
        )
        validation, train = splits["validation"], splits["train"]
        held += validation
        begin, end = text.index(validation[0]), text.index(validation[-1]) + 1
        assert validation == text[begin:end]
        assert train == text[: max(0, begin - 10)] + text[end + 10 : 900]
        assert splits["test"] == text[900:]
    assert held == text[:900]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.99])
def test_a_training_fraction_thins_the_training_split_alone_and_evenly(tmp_path: Path, fraction: float) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(4000))
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    whole = _splits(path, tmp_path, level="byte")
    part = _splits(path, tmp_path, level="byte", training_fraction=fraction)
    assert {name: part[name] for name in ("validation", "test")} == {n: whole[n] for n in ("validation", "test")}
    assert len(part["train"]) == pytest.approx(fraction * len(whole["train"]), abs=20)
    assert part["train"] == "".join(sorted(part["train"]))
    before = sum(c < whole["train"][1800] for c in part["train"])
    assert before == pytest.approx(len(part["train"]) - before, abs=20)
