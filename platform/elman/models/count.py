"""How many parameters a model has, by part, and the hidden size that a budget of them buys."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from elman.config.schema import ModelConfig
from elman.errors import ConfigError

if TYPE_CHECKING:
    from elman.models.language_model import LanguageModel  # which solves its size here

BYTES_IN_TRAINING = 16
"""Of a parameter: itself, its gradient and Adam's two moments, in single precision."""


def refuse_what_no_memory_holds(config: ModelConfig, parameters: int) -> None:
    """Refuse a model that would be killed while it is made, or in its first step.

    Raises:
        ConfigError: Training it takes more memory than the machine has.
    """
    needed, there = parameters * BYTES_IN_TRAINING, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"model.hidden_size {config.hidden_size}, model.num_layers {config.num_layers} and model.embedding_size "
            f"{config.embedding_size} make {parameters:,} parameters, whose training takes {needed / 1e9:,.0f} GB, and "
            f"this machine has {there / 1e9:,.0f}: lower one of them."
        )


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters of a model by part, and in total.

    The parts are embedding, recurrent (blocks for the transformer), projection (what changes
    widths between the others) and output. Tied weights count once, as embedding.
    """
    body = "blocks" if model.config.cell == "transformer" else "recurrent"
    counts = {"embedding": 0, body: 0, "projection": 0, "output": 0}
    part_of = {
        "embedding": "embedding",
        "input_projection": "projection",
        "body": body,
        "projection": "projection",
        "output_weight": "output",
        "output_bias": "output",
        "adaptive": "output",
    }
    for name, parameter in model.named_parameters():
        counts[part_of[name.partition(".")[0]]] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def solve_hidden_size(config: ModelConfig, total: Callable[[int], int]) -> int:
    """Largest hidden size whose parameters are within ``config.parameter_budget``.

    Args:
        config: Holds the budget.
        total: Parameters of the whole model at a hidden size.

    Raises:
        ConfigError: If even the smallest is beyond the budget, or the hidden size makes no difference.
    """
    budget = config.parameter_budget
    assert budget is not None
    unit = 2 * config.num_heads if config.cell == "transformer" else 1
    smallest = total(unit)
    if smallest > budget:
        raise ConfigError(
            f"model.parameter_budget must be at least {smallest} for this vocabulary, "
            f"model.embedding_size {config.embedding_size} and model.num_layers {config.num_layers}, got {budget}."
        )
    if config.num_layers == 1 and config.last_hidden_size is not None:
        raise ConfigError(
            f"model.last_hidden_size {config.last_hidden_size} leaves model.parameter_budget nothing to choose "
            "with model.num_layers 1: set it to null."
        )
    fits, beyond = 1, 2  # in units
    while total(beyond * unit) <= budget:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if total(middle * unit) <= budget:
            fits = middle
        else:
            beyond = middle
    # The count rises with the hidden size but for one dip: equal sizes need no projection.
    equal = config.embedding_size
    if equal > fits * unit and equal % unit == 0 and total(equal) <= budget:
        return equal
    return fits * unit
