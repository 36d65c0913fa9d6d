from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elman.config.schema import ExperimentConfig
from elman.config.tree import build, differences, flatten, flatten_mapping, nest, override, settings, signature
from elman.errors import ConfigError, ElmanError

NAMES = list(settings(ExperimentConfig))


def test_flattening_and_building_give_the_same_configuration_back() -> None:
    config = build(ExperimentConfig, {"model.variational": ["input", "output"], "optimizer.betas": [0.5, 0.9]})
    assert build(ExperimentConfig, flatten(config)) == config
    assert build(ExperimentConfig, flatten_mapping(ExperimentConfig, nest(flatten(config)))) == config


def test_a_misspelt_name_is_answered_with_the_nearest_real_one() -> None:
    with pytest.raises(ConfigError, match=r"model\.hiden_size is not a setting\. Did you mean model\.hidden_size\?"):
        flatten_mapping(ExperimentConfig, {"model": {"hiden_size": 3}})


def test_a_setting_in_the_wrong_section_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean data\.batch_size\?"):
        flatten_mapping(ExperimentConfig, {"trainer": {"batch_size": 3}})


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.hidden_size", "12"), ("model.hidden_size", True), ("model.hidden_size", 1.0), ("model.dropout", "0.5"),
     ("model.tie_weights", 1), ("corpus.level", "letters"), ("model.variational", "input"), ("optimizer.betas", [0.9]),
     ("name", 3), ("trainer.max_epochs", "null"), ("corpus.name", None)],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_not_converted(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        build(ExperimentConfig, {name: value})


def test_an_integer_serves_as_a_number() -> None:
    assert build(ExperimentConfig, {"optimizer.lr": 1}).optimizer.lr == 1.0


def test_overriding_checks_as_reading_does() -> None:
    config = ExperimentConfig()
    assert override(config, {"model.hidden_size": 7}).model.hidden_size == 7
    assert config.model.hidden_size != 7
    with pytest.raises(ConfigError):
        override(config, {"model.hidden_size": 0})
    with pytest.raises(ConfigError):
        override(config, {"model.size": 1})


def test_differences_name_only_what_was_changed() -> None:
    assert differences(build(ExperimentConfig, {"seed": 5, "model.dropout": 0.0})) == {"seed": 5}


def test_the_signature_ignores_names_and_tracking_and_nothing_else() -> None:
    base = ExperimentConfig()
    assert signature(base) == signature(override(base, {"name": "x", "tracking.experiment": "y"}))
    assert signature(base) != signature(override(base, {"seed": 2}))
    assert signature(base) != signature(override(base, {"model.dropout": 0.1}))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
def test_arbitrary_values_make_a_configuration_or_an_error_of_ours(flat: dict[str, Any]) -> None:
    try:
        config = build(ExperimentConfig, flat)
    except ElmanError as error:
        assert "\n" not in str(error)  # noqa: PT017 - or none is raised
    else:
        assert build(ExperimentConfig, flatten(config)) == config
