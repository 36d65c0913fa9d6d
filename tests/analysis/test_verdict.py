from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from elman.analysis.verdict import block_bits, compare_blocks, token_losses
from elman.config.schema import DataConfig
from elman.data.datamodule import evaluation_loader
from elman.tasks.language_modeling import evaluate
from elman.text.prepare import prepare
from elman.text.prepared import PreparedSplit
from elman.training.experiment import build_language_model
from support import tiny


@pytest.mark.parametrize("cell", ["gru", "transformer"])
def test_token_losses_are_the_evaluation_s_in_the_order_of_the_text(text_file: Path, cell: str) -> None:
    config = tiny(text_file, model__cell=cell)
    corpus = prepare(config.corpus)
    split = corpus.splits["test"]
    assert isinstance(split, PreparedSplit)
    model = build_language_model(config, corpus.tokenizer)
    cpu = torch.device("cpu")
    one_row, rows = DataConfig(evaluation_batch_size=1, sequence_length=16), DataConfig(
        evaluation_batch_size=7, sequence_length=16
    )
    nats = token_losses(model, split, rows, cpu, "fp32")
    assert len(nats) == split.tokens
    scores = evaluate(model, evaluation_loader(split, rows, model.start_id), cpu, "fp32")
    assert nats.mean() == pytest.approx(scores.loss, rel=1e-5)
    # The first row is the beginning of the text, which one row alone begins with too.
    first = split.tokens // 7
    assert nats[:first] == pytest.approx(token_losses(model, split, one_row, cpu, "fp32")[:first], abs=1e-4)
    bits = block_bits(nats, split)
    assert bits.mean() == pytest.approx(split.bits_per_byte(scores.loss), rel=2e-2)


def test_a_clear_difference_is_called_and_chance_is_not() -> None:
    source = np.random.default_rng(0)
    text = source.normal(2.0, 0.3, 200)  # the same hard and easy places for both

    def runs(shift: float) -> np.ndarray:
        return np.stack([text + shift + source.normal(0, 0.002) + source.normal(0, 0.02, 200) for _ in range(3)])

    verdict = compare_blocks("a", runs(0.0), "b", runs(0.05))
    assert str(verdict).startswith("a is better than b by 0.0")
    assert verdict.difference == pytest.approx(0.05, abs=0.01)
    turned = compare_blocks("b", runs(0.05), "a", runs(0.0))
    assert (turned.better, turned.worse) == ("a", "b")
    calls = sum(compare_blocks("a", runs(0.0), "b", runs(0.0)).is_sure for _ in range(40))
    assert calls <= 6  # about one in twenty by design


def test_seeds_that_differ_widen_the_interval_and_pairing_narrows_it() -> None:
    source = np.random.default_rng(1)
    text = source.normal(2.0, 0.5, 200)
    steady = np.stack([text + source.normal(0, 0.01, 200) for _ in range(3)])
    wild = np.stack([text + shift for shift in (-0.2, 0.0, 0.2)])
    assert compare_blocks("a", steady, "b", wild).margin > 5 * compare_blocks("a", steady, "b", steady + 0.01).margin
    assert compare_blocks("a", steady, "b", steady + 0.01).text_error < text.std() / 200**0.5 / 5
    alone = compare_blocks("a", steady[:1], "b", wild[:1])
    assert alone.seed_error is None
