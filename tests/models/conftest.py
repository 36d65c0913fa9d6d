"""Tiny float64 models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from elman.config.schema import ModelConfig
from elman.models.language_model import LanguageModel, build_model

VOCABULARY_SIZE = 7


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    """Builds a model of seven tokens whose every parameter is random, so that none hides behind a zero."""

    def build(cell: str = "lstm", *, context_length: int = 4, own_start: bool = True, **settings: Any) -> LanguageModel:
        torch.manual_seed(0)
        settings = {"embedding_size": 6, "hidden_size": 8, "num_layers": 2, "num_heads": 2} | settings
        config = ModelConfig(cell=cell, **settings)
        model = build_model(
            config,
            vocabulary_size=VOCABULARY_SIZE,
            num_inputs=VOCABULARY_SIZE + own_start,
            start_id=VOCABULARY_SIZE if own_start else 0,
            context_length=context_length,
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    return build
