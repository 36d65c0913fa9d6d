"""A model under examination, and what its examiners share.

Shape suffixes: B batch, T time steps, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elman.models.language_model import LanguageModel
from elman.models.recurrent import RecurrentLayer
from elman.text.tokenizer import Tokenizer

BATCH, STEPS = 4, 24
"""Of the windows that are run; more steps than the context of the small model's transformer."""

EXACT = 1e-9
"""Relative distance of what are the same operations in double precision, in another order."""

BUG = "a bug of this model's code: what is measured with it cannot be trusted."


@dataclass(frozen=True)
class Specimen:
    """A model to examine, with text of its corpus.

    Attributes:
        text: The beginning of its training text.
        is_fresh: Whether its weights are untrained.
        knows_text: Whether the vocabulary was made from this very text, with no symbol left out.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    text: str
    is_fresh: bool = True
    knows_text: bool = True

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs (B, T) and targets (B, T): the beginning of the text, repeated where it is short."""
        ids = torch.tensor(self.tokenizer.encode(self.text[: 40 * BATCH * STEPS]), dtype=torch.int64)
        targets_BT = ids.repeat(-(-BATCH * STEPS // len(ids)))[: BATCH * STEPS].view(BATCH, STEPS)
        start = torch.full((BATCH, 1), self.tokenizer.start_id)
        return torch.cat((start, targets_BT[:, :-1]), dim=1), targets_BT


def exact(module: Any) -> Any:
    """A copy in double precision and in evaluation mode, whose every weight takes a gradient."""
    return copy.deepcopy(module).double().eval().requires_grad_()


def without_dropout(model: LanguageModel) -> LanguageModel:
    """The model itself, every probability of dropping set to zero."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0  # type: ignore[assignment]  # of ours and torch's dropout alike
        if isinstance(module, RecurrentLayer):
            module.weight_dropout = 0.0
    return model


def random_tokens(model: LanguageModel) -> Tensor:
    """A window (B, T) of any tokens."""
    return torch.randint(model.vocabulary_size, (BATCH, STEPS))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above one; NaN where either is."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)) if expected.numel() else 0.0


def listed(values: Iterable[object], most: int = 4) -> str:
    """The first few of them, and how many more there are."""
    said = [str(value) for value in values]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")
