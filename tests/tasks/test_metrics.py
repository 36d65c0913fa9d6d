from __future__ import annotations

import math

import pytest
import torch

from elman.tasks.metrics import Scores, Tally, count_correct, perplexity


class Sizes:
    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2) * 0.5

    def bits_per_character(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2)


def test_a_tally_weighs_windows_by_their_tokens() -> None:
    tally = Tally()
    tally.add(torch.tensor(10.0), torch.tensor(1), torch.tensor(4))
    tally.add(torch.tensor(2.0), 3, 8)
    assert tally.scores() == Scores(loss=1.0, accuracy=4 / 12, tokens=12)


def test_a_tally_of_millions_of_tokens_keeps_its_digits() -> None:
    tally = Tally()
    for _ in range(2000):
        tally.add(torch.tensor(10_000.1), 0, 1000)
    assert tally.scores().loss == pytest.approx(float(torch.tensor(10_000.1)) / 1000, abs=1e-9)


def test_scores_carry_every_figure_by_its_name() -> None:
    metrics = Scores(loss=math.log(4), accuracy=0.25, tokens=10).metrics("val", Sizes())
    assert metrics == pytest.approx(
        {"val/loss": math.log(4), "val/perplexity": 4.0, "val/bits_per_byte": 1.0, "val/bits_per_character": 2.0,
         "val/accuracy": 0.25}
    )  # fmt: skip


def test_perplexity_of_a_hopeless_loss_is_infinite_not_an_error() -> None:
    assert perplexity(10_000.0) == math.inf


def test_positions_without_a_target_are_never_right() -> None:
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert count_correct(logits, torch.tensor([[1, 1, -100]])) == 1
