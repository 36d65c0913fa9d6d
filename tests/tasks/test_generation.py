from __future__ import annotations

import pytest
import torch

from elman.config.schema import GenerationConfig, ModelConfig
from elman.errors import DataError
from elman.models import sampling
from elman.models.language_model import build_model
from elman.tasks.generation import TextGenerator
from elman.text.tokenizer import Tokenizer


def generator(tokenizer: Tokenizer) -> TextGenerator:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(embedding_size=8, hidden_size=8),
        vocabulary_size=tokenizer.vocabulary_size,
        num_inputs=tokenizer.num_inputs,
        start_id=tokenizer.start_id,
        context_length=8,
    )
    return TextGenerator(model, tokenizer)


@pytest.fixture
def letters() -> TextGenerator:
    return generator(Tokenizer.from_characters(dict.fromkeys("abcdef \n", 5)))


def test_the_same_prompt_and_seed_give_the_same_text(letters: TextGenerator) -> None:
    config = GenerationConfig(length=50, seed=3)
    assert letters.complete("ab", config) == letters.complete("ab", config)
    assert letters.complete("ab", config) != letters.complete("ab", GenerationConfig(length=50, seed=4))


def test_streamed_pieces_join_to_the_whole(letters: TextGenerator) -> None:
    config = GenerationConfig(length=30, samples=3)
    pieces = list(letters.stream("a", config))
    assert ["".join(p[i] for p in pieces) for i in range(3)] == letters.complete("a", config)
    assert all(len(text) == 30 for text in letters.complete("a", config))


def test_characters_never_seen_are_named_and_can_be_skipped(letters: TextGenerator) -> None:
    with pytest.raises(DataError, match=r"characters that the model never saw: 'X' '7'\."):
        letters.complete("aX7b", GenerationConfig())
    config = GenerationConfig(length=20)
    assert letters.complete("aX7b", config, "skip") == letters.complete("ab", config)


def test_an_empty_prompt_starts_from_the_beginning_of_a_text(letters: TextGenerator) -> None:
    assert len(letters.complete("", GenerationConfig(length=12))[0]) == 12


def test_unknown_is_never_written() -> None:
    words = generator(Tokenizer.from_words({"a": 3, "b": 2, "<eos>": 2}))
    assert "<unk>" not in words.complete("", GenerationConfig(length=300, temperature=5.0))[0]


def test_a_continuation_ends_before_the_stop_text(letters: TextGenerator) -> None:
    free = letters.complete("a", GenerationConfig(length=200))[0]
    stop = free[40:43]
    text = letters.complete("a", GenerationConfig(length=200, stop=stop))[0]
    assert text == free[: free.index(stop)]


def test_a_stop_text_that_never_comes_changes_nothing(letters: TextGenerator) -> None:
    free = letters.complete("a", GenerationConfig(length=60))
    assert letters.complete("a", GenerationConfig(length=60, stop=free[0][-2:] + "XYZ")) == free


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_stop_text_ends_at_the_same_place_whatever_comes_at_once(
    letters: TextGenerator, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = letters.complete("a", GenerationConfig(length=300))[0]
    monkeypatch.setattr(sampling, "CHUNK_SECONDS", seconds)
    stop = free[70:74]
    pieces = [piece for [piece] in letters.stream("a", GenerationConfig(length=300, stop=stop))]
    assert "".join(pieces) == free[: free.index(stop)]


def test_text_appears_while_it_is_generated(letters: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK_SECONDS", 0.0)
    pieces = [piece for [piece] in letters.stream("a", GenerationConfig(length=100))]
    assert len(pieces) > 50
    assert max(map(len, pieces)) <= sampling.FIRST_CHUNK


def test_bytes_stream_whole_characters() -> None:
    pieces = list(generator(Tokenizer.for_bytes()).stream("é", GenerationConfig(length=100, temperature=1.0)))
    config = GenerationConfig(length=100, temperature=1.0)
    assert "".join(p[0] for p in pieces) == generator(Tokenizer.for_bytes()).complete("é", config)[0]


def test_beams_come_best_first_with_their_scores(letters: TextGenerator) -> None:
    found = letters.beams("ab", GenerationConfig(length=6, beams=4, samples=3))
    scores = [score for _, score in found]
    assert len(found) == 3
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 0
    assert [text for text, _ in found] == letters.complete("ab", GenerationConfig(length=6, beams=4, samples=3))
