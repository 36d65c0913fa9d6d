"""Counting parameters, and spending a budget of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elman.config.schema import RECURRENT_CELLS, ModelConfig
from elman.errors import ConfigError
from elman.models.count import count_parameters
from elman.models.language_model import LanguageModel, build_model

CELLS = (*RECURRENT_CELLS, "transformer")
SIZES = {"vocabulary_size": 70, "num_inputs": 71, "start_id": 70, "context_length": 8}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_sum_to_the_number_of_elements(cell: str, tied: bool) -> None:
    config = ModelConfig(cell=cell, hidden_size=16, embedding_size=12, num_layers=2, tie_weights=tied)
    model = build_model(config, **SIZES)
    counts = count_parameters(model)
    storages = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert counts["total"] == sum(storages.values()) == sum(counts.values()) - counts["total"]
    assert counts["embedding"] == 71 * 12
    assert counts["output"] == (70 if tied else 70 * 16 + 70)
    assert counts["projection"] == 12 * 16 * (tied + (cell == "transformer"))
    assert list(counts)[1] == ("blocks" if cell == "transformer" else "recurrent")


def test_lstm_of_one_layer_counts_as_its_equations_say() -> None:
    counts = count_parameters(build_model(ModelConfig(hidden_size=16, embedding_size=12), **SIZES))
    assert counts["recurrent"] == 4 * (16 * 12 + 16 * 16 + 2 * 16)


@pytest.mark.parametrize(("cell", "gates"), [("mingru", 2), ("minlstm", 3)])
def test_minimal_cells_have_one_matrix_and_one_bias_a_gate(cell: str, gates: int) -> None:
    counts = count_parameters(build_model(ModelConfig(cell=cell, hidden_size=16, embedding_size=12), **SIZES))
    assert counts["recurrent"] == gates * (16 * 12 + 16)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("settings", [{}, {"tie_weights": True, "num_layers": 2}])
def test_budget_is_met_within_one_percent_and_never_passed(cell: str, settings: dict[str, object]) -> None:
    budget = 30_000_000 if cell == "transformer" else 1_000_000  # its sizes come in steps of 2 × num_heads
    with torch.device("meta"):
        model = build_model(ModelConfig(cell=cell, parameter_budget=budget, num_heads=2, **settings), **SIZES)
    assert 0.99 * budget <= count_parameters(model)["total"] <= budget


@pytest.mark.parametrize("cell", ["rnn", "transformer"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_larger_hidden_size_keeps_the_budget(cell: str, tied: bool) -> None:
    config = ModelConfig(cell=cell, embedding_size=20, num_heads=1, tie_weights=tied, hidden_size=20)
    totals = {}
    for hidden_size in range(2, 41, 2 if cell == "transformer" else 1):
        with torch.device("meta"):
            model = LanguageModel(replace(config, hidden_size=hidden_size), **SIZES)
        totals[hidden_size] = count_parameters(model)["total"]
    if cell == "rnn" and tied:
        assert totals[20] < totals[18]  # equal sizes need no projection: a dip to look beyond
    for budget in list(totals.values())[::4]:
        solved = build_model(replace(config, parameter_budget=budget), **SIZES).config.hidden_size
        assert solved == max(size for size, total in totals.items() if total <= budget)


def test_architecture_holds_the_solved_size_and_no_budget() -> None:
    model = build_model(ModelConfig(parameter_budget=100_000), **SIZES)
    assert model.config.parameter_budget is None
    assert model.architecture["config"]["hidden_size"] == model.config.hidden_size == model.body.output_size


def test_budget_too_small_for_the_vocabulary_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model.parameter_budget must be at least \d+ .* got 100\.$"):
        build_model(ModelConfig(parameter_budget=100), **SIZES)


def test_budget_that_no_size_can_spend_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.last_hidden_size 8 leaves model\.parameter_budget nothing"):
        build_model(ModelConfig(parameter_budget=100_000, last_hidden_size=8), **SIZES)
