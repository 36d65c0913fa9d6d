from __future__ import annotations

import math
from typing import Any

import pytest

from elman.config.schema import ExperimentConfig, GenerationConfig
from elman.config.tree import build, settings
from elman.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.dropout", 1.0), ("model.dropout", -0.1), ("model.dropout", math.nan), ("model.hidden_size", 0),
        ("model.num_layers", 0), ("model.embedding_size", -1), ("model.weight_dropout", 1.5),
        ("model.parameter_budget", 0), ("model.forget_bias", math.inf), ("model.variational", ["input", "input"]),
        ("optimizer.lr", 0.0), ("optimizer.lr", math.inf), ("optimizer.lr", math.nan), ("optimizer.max_grad_norm", 0.0),
        ("optimizer.betas", [0.9, 1.0]), ("optimizer.weight_decay", -1e-9), ("optimizer.warmup_steps", -1),
        ("optimizer.decay_factor", 1.0), ("data.batch_size", 0), ("data.sequence_length", 0),
        ("trainer.max_epochs", 0), ("trainer.max_minutes", 0.0), ("trainer.accumulate_windows", 0),
        ("corpus.validation_fraction", 0.0), ("corpus.test_fraction", 1.0), ("corpus.min_count", 0),
        ("corpus.name", " "), ("seed", -1), ("name", ""), ("name", "x" * 129),
        ("name", "a\u202eb"), ("name", "a\x00"), ("tracking.register", "a/b"),
        ("tracking.experiment", "../x"), ("tracking.experiment", ".hidden"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_dotted_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as refusal:
        build(ExperimentConfig, {name: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "flat",
    [
        {"model.cell": "gru", "model.nonlinearity": "relu"},
        {"model.cell": "rnn", "model.forget_bias": 2.0},
        {"model.layer_dropout": 0.5},
        {"model.cell": "transformer", "model.hidden_size": 30},
        {"model.cell": "transformer", "model.initial_state": "learned"},
        {"model.cell": "transformer", "model.weight_dropout": 0.5},
        {"optimizer.name": "adam", "optimizer.momentum": 0.9},
        {"optimizer.name": "sgd", "optimizer.nesterov": True},
        {"trainer.max_epochs": None},
        {"corpus.validation_fraction": 0.6, "corpus.test_fraction": 0.5},
        {"corpus.level": "byte", "corpus.vocabulary_size": 300},
        {"corpus.level": "bpe", "corpus.vocabulary_size": 100},
        {"corpus.streaming": True},
        {"model.head": "last_step", "data.reset_at_documents": True},
    ],
)
def test_settings_that_contradict_each_other_are_refused(flat: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(ExperimentConfig, flat)


def test_dropout_at_a_place_follows_the_general_setting_until_it_has_its_own() -> None:
    model = build(ExperimentConfig, {"model.dropout": 0.3, "model.output_dropout": 0.0, "model.num_layers": 2}).model
    assert [model.dropout_at(p) for p in ("embedding", "input", "layer", "output")] == [0.0, 0.3, 0.3, 0.0]


def test_every_setting_says_what_it_does() -> None:
    for cls in (ExperimentConfig, GenerationConfig):
        for setting in settings(cls).values():
            assert setting.help.endswith("."), setting.name
            assert len(setting.help) > 15, setting.name
