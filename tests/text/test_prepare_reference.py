"""What is prepared, against a plain and slow account of what it should be."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from math import log2
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.config.schema import CorpusConfig, Level
from elman.text import encode, readers
from elman.text.prepare import prepare
from elman.text.prepared import PreparedSplit
from elman.text.tokenizer import Tokenizer

SPACES = ["\n", "\r\n", " ", "\u3000", "\t"]
PIECES = ["the ", "cat ", "sat", "naïve ", "世界", "<unk> ", "mat.", "\U0001f600", "x1", *SPACES]
texts = st.lists(st.sampled_from(PIECES), min_size=60, max_size=120).map("".join)


@dataclass
class Plain:
    """One split, worked out symbol by symbol."""

    ids: list[int]
    characters: int
    bytes: int
    hidden: list[str]


def symbols_of(level: Level, text: str) -> list[str]:
    if level == "character":
        return list(text)
    for line_end in ("\r\n", "\r"):
        text = text.replace(line_end, "\n")
    return text.replace("\n", " <eos> ").split()


def ranked(level: Level, train: str) -> list[str]:
    special = {"character": ["<unk>"], "word": ["<unk>", "<eos>"]}[level]
    counts = Counter(symbols_of(level, train))
    return special + sorted((s for s in counts if s not in special), key=lambda symbol: (-counts[symbol], symbol))


def plain(level: Level, text: str, train: str, tokenizer: Tokenizer) -> Plain:
    if level == "byte":
        return Plain(list(text.encode()), len(text), len(text.encode()), [])
    if level == "bpe":
        assert tokenizer.fingerprint == Tokenizer.train_bpe([train]).fingerprint
        return Plain(tokenizer.encode(text), len(text), len(text.encode()), [])
    vocabulary = ranked(level, train)
    assert [*tokenizer._tokens] == vocabulary
    symbols = symbols_of(level, text)
    ids = [vocabulary.index(symbol) if symbol in vocabulary else 0 for symbol in symbols]
    hidden = [symbol for symbol in symbols if symbol not in vocabulary]
    shown = text if level == "character" else " ".join(symbols).replace(" <eos>", "\n").replace("<eos>", "\n")
    shown = shown.replace("\n ", "\n") if level == "word" else shown
    return Plain(ids, len(shown), len(shown.encode()), hidden)


def spelled(level: Level, train: str, hidden: list[str]) -> float:
    """Bits of the hidden symbols, under a unigram of the training symbols' bytes with add-one smoothing."""
    special = () if level == "character" else ("<unk>", "<eos>")
    symbols = [symbol for symbol in symbols_of(level, train) if symbol not in special]
    counts = Counter(sign for symbol in symbols for sign in (*symbol.encode(), 256))
    price = {sign: log2((counts.total() + 257) / (counts[sign] + 1)) for sign in range(257)}
    return sum(price[sign] for symbol in hidden for sign in (*symbol.encode(), 256))


@pytest.mark.parametrize("level", ["byte", "character", "word", "bpe"])
@given(text=texts, block=st.integers(150, 400))
@settings(deadline=None, max_examples=12)
def test_a_prepared_corpus_is_what_a_plain_account_says(level: Level, text: str, block: int) -> None:
    text = "the cat\n" + text  # no text of one symbol
    first, second = int(len(text) * 0.6), int(len(text) * 0.8)
    parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK", block)  # every border falls somewhere else
        patch.setattr(encode, "BLOCK", 4 * block)
        path = Path(name) / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        config = CorpusConfig(name=str(path), level=level, validation_fraction=0.2, test_fraction=0.2)
        if any(not symbols_of("word", part) for part in parts.values()):
            return
        prepared = prepare(config, Path(name) / "cache")
        for split, part in parts.items():
            found, expected = prepared.splits[split], plain(level, part, parts["train"], prepared.tokenizer)
            assert isinstance(found, PreparedSplit)
            assert found.open().tolist() == expected.ids
            assert (found.characters, found.bytes) == (expected.characters, expected.bytes)
            assert (found.unknown_tokens, found.unknown_types) == (len(expected.hidden), len(set(expected.hidden)))
            if expected.hidden:
                assert found.unknown_bits == pytest.approx(spelled(level, parts["train"], expected.hidden))


@pytest.mark.parametrize("level", ["word", "bpe"])
def test_one_core_makes_the_files_that_many_make(level: Level, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {number % 97} cats of {number} mats\n" for number in range(4000)), encoding="utf-8")
    made = []
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        prepared = prepare(CorpusConfig(name=str(path), level=level, vocabulary_size=600), tmp_path / parallel)
        made.append({file.name: file.read_bytes() for file in prepared.directory.iterdir()})
    assert made[0] == made[1]
    assert len(made[0]["train.bin"]) > 4000
