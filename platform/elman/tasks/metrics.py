"""What a scored text is worth: loss, perplexity, bits and accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Bits(Protocol):
    """The split's sizes, which turn nats per token into bits per byte and per character."""

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of the text that the tokens stand for."""
        ...

    def bits_per_character(self, nats_per_token: float) -> float:
        """Bits per character of the text that the tokens stand for."""
        ...


def perplexity(nats_per_token: float) -> float:
    """exp(loss); infinite where that overflows, as it does just before training diverges."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Scores:
    """A text, scored.

    Attributes:
        loss: Mean cross-entropy, nats per token.
        accuracy: Share of tokens that were the likeliest prediction.
        tokens: Tokens scored.
    """

    loss: float
    accuracy: float
    tokens: int

    def metrics(self, prefix: str, split: Bits) -> dict[str, float]:
        """Every figure by its name in MLflow, such as ``val/bits_per_byte``."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/perplexity": perplexity(self.loss),
            f"{prefix}/bits_per_byte": split.bits_per_byte(self.loss),
            f"{prefix}/bits_per_character": split.bits_per_character(self.loss),
            f"{prefix}/accuracy": self.accuracy,
        }


class Tally:
    """Sums over windows, kept on the device until somebody asks: asking waits for a GPU."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | int = 0
        self._tokens: Tensor | int = 0

    def add(self, loss_sum: Tensor, correct: Tensor | int, tokens: Tensor | int) -> None:
        """Count one window: summed nats, right predictions, and targets."""
        # Sums of sums lose digits in single precision over millions of tokens.
        self._loss = self._loss + loss_sum.detach().double()
        self._correct = self._correct + correct
        self._tokens = self._tokens + tokens

    def scores(self) -> Scores:
        """What has been counted."""
        tokens = int(self._tokens)
        if tokens == 0:
            return Scores(loss=math.nan, accuracy=math.nan, tokens=0)
        return Scores(loss=float(self._loss) / tokens, accuracy=int(self._correct) / tokens, tokens=tokens)


def count_correct(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Positions whose likeliest prediction is the target."""
    with torch.no_grad():
        return (logits_BTV.argmax(-1) == targets_BT).sum()
