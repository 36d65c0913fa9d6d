"""Large vocabularies through the whole of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from elman.config.schema import GenerationConfig, TrackingConfig
from elman.models import fused_loss, language_model
from elman.tasks.generation import TextGenerator
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from elman.training.loading import load_model
from support import tiny


def test_a_model_with_adaptive_softmax_trains_generates_and_reloads(workplace: Path, text_file: Path) -> None:
    store = RunStore(TrackingConfig())
    settings = {"corpus__level": "word", "model__softmax": "adaptive", "model__cutoffs": (20, 40)}
    result = run_experiment(tiny(text_file, trainer__max_steps=6, **settings), store)
    assert math.isfinite(result.metrics["val/bits_per_byte"])
    loaded = load_model(result.run_id, store)
    assert loaded.model.adaptive is not None
    generator = TextGenerator(loaded.model, loaded.tokenizer)
    assert generator.complete("", GenerationConfig(length=5))[0].strip()
    assert generator.beams("", GenerationConfig(length=5, beams=3))[0][1] < 0


WHOLE = [(language_model, "kernel_pays", lambda *_: False)]
IN_CHUNKS = [(language_model, "LARGE_VOCABULARY", 2)]
BY_SMALL_KERNEL = [(language_model, "kernel_pays", lambda *_: True), (fused_loss, "is_small", lambda *_: True)]
BY_LARGE_KERNEL = [(language_model, "kernel_pays", lambda *_: True), (fused_loss, "is_small", lambda *_: False)]


@pytest.mark.parametrize(
    ("precision", "parts", "rel"),
    [("fp32", IN_CHUNKS, 1e-4), ("bf16", BY_SMALL_KERNEL, 1e-3), ("bf16", BY_LARGE_KERNEL, 1e-3)],
    ids=["chunks", "small kernel", "large kernel"],
)
def test_loss_in_parts_trains_to_the_figures_of_whole_logits(
    precision: str, parts: list[tuple[Any, str, Any]], rel: float, workplace: Path, text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny(text_file, corpus__level="word", trainer__max_steps=6, trainer__precision=precision)
    for module, name, value in WHOLE:
        monkeypatch.setattr(module, name, value)
    whole = run_experiment(config, RunStore(TrackingConfig())).metrics
    for module, name, value in parts:
        monkeypatch.setattr(module, name, value)
    found = run_experiment(config, RunStore(TrackingConfig())).metrics
    assert found["val/loss"] == pytest.approx(whole["val/loss"], rel=rel)
    assert found["val/accuracy"] == pytest.approx(whole["val/accuracy"], abs=0.01)
