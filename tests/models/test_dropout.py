"""Dropout draws what it says, scales what it keeps, and is off in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elman.config.schema import MINIMAL_CELLS, RECURRENT_CELLS, ModelConfig
from elman.models.dropout import Dropout, WordDropout, drop_weight
from elman.models.fused import Rows
from elman.models.language_model import LanguageModel

P = 0.3
DRAWS = 40_000
TOLERANCE = 5 * (P * (1 - P) / DRAWS) ** 0.5  # five standard errors of the kept share


def kept_share(dropped: Tensor) -> float:
    """Share that is kept, once it is sure that all of it is scaled by 1 / (1 − p)."""
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - P)))
    return kept.numel() / dropped.numel()


@pytest.mark.parametrize("shape", [(20, 20, 100), (200, 1, 200)])
def test_per_step_dropout_draws_every_unit_of_every_step(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    dropped = Dropout(P)(torch.ones(shape))
    assert abs(kept_share(dropped) - (1 - P)) < TOLERANCE
    if shape[1] > 1:
        agree = ((dropped[:, 0] == 0) == (dropped[:, 1] == 0)).double().mean().item()
        assert abs(agree - (P**2 + (1 - P) ** 2)) < 0.06  # as independent draws agree


def test_variational_dropout_keeps_one_mask_for_the_window_and_differs_between_rows() -> None:
    torch.manual_seed(0)
    dropped = Dropout(P, variational=True)(torch.ones(200, 3, 200))
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert abs(kept_share(dropped[:, 0]) - (1 - P)) < TOLERANCE
    assert not torch.equal(dropped[0], dropped[1])


def test_per_step_word_dropout_drops_single_occurrences_whole() -> None:
    torch.manual_seed(0)
    tokens_BT = torch.zeros(200, 200, dtype=torch.int64)
    scale_BT = WordDropout(P)(tokens_BT, 5, torch.empty(0))
    assert scale_BT.unique().tolist() == [0, pytest.approx(1 / (1 - P))]
    assert abs(kept_share(scale_BT) - (1 - P)) < TOLERANCE


def test_variational_word_dropout_drops_a_word_wherever_it_occurs() -> None:
    torch.manual_seed(0)
    tokens_BT = torch.randint(DRAWS, (50, 2000))
    dropped = WordDropout(P, variational=True)(tokens_BT, DRAWS, torch.empty(0))
    first = torch.zeros(DRAWS).scatter_(0, tokens_BT.flatten(), dropped.flatten())
    assert torch.equal(dropped, first[tokens_BT])
    assert abs(kept_share(first[tokens_BT.unique()]) - (1 - P)) < TOLERANCE * 2


@pytest.mark.parametrize("variational", [False, True])
def test_dropped_words_are_rows_of_zeros_and_the_others_are_scaled(
    tiny: Callable[..., LanguageModel], variational: bool
) -> None:
    model = tiny("lstm", embedding_dropout=P, variational=("embedding",) if variational else ()).train()
    tokens_BT = torch.randint(model.vocabulary_size, (4, 60))

    def embedded() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        found = model._embed(tokens_BT)
        dense_BTE = found.dense() if isinstance(found, Rows) else found
        (gradient_VE,) = torch.autograd.grad(dense_BTE.pow(2).sum(), model.embedding.weight)
        return dense_BTE, gradient_VE

    assert isinstance(model._embed(tokens_BT), Rows)
    rows = embedded()
    torch.manual_seed(1)
    scale_BT = model.word_dropout(tokens_BT, model.num_inputs, model.embedding.weight)
    torch.testing.assert_close(rows[0], model.embedding(tokens_BT) * scale_BT.unsqueeze(-1))
    model.num_inputs *= 1000  # as if the embedding were too large to be multiplied whole
    if not variational:
        for found, expected in zip(rows, embedded(), strict=True):
            torch.testing.assert_close(found, expected)


def test_weight_dropout_draws_single_weights() -> None:
    torch.manual_seed(0)
    assert abs(kept_share(drop_weight(torch.ones(200, 200), P)) - (1 - P)) < TOLERANCE


@pytest.mark.parametrize("cell", ["lstm", "transformer"])
@pytest.mark.parametrize("place", ["embedding", "input", "layer", "output"])
@pytest.mark.parametrize("variational", [False, True])
def test_dropout_at_each_place_acts_in_training_alone(
    tiny: Callable[..., LanguageModel], cell: str, place: str, variational: bool
) -> None:
    settings = {f"{place}_dropout": 0.5, "variational": (place,) if variational else ()}
    model = tiny(cell, **settings)
    plain = tiny(cell)
    tokens_BT = torch.randint(7, (4, 6))
    assert torch.equal(model(tokens_BT)[0], plain(tokens_BT)[0])
    model.train()
    features = model.features(tokens_BT)
    assert not torch.allclose(model.project(features.dropped_BTH), plain(tokens_BT)[0])
    raw_is_clean = torch.allclose(features.raw_BTH, plain.features(tokens_BT).raw_BTH)
    assert raw_is_clean == (place == "output")


def test_dropout_falls_back_to_the_common_probability() -> None:
    config = ModelConfig(dropout=0.4, output_dropout=0.1)
    model = LanguageModel(config, vocabulary_size=3, num_inputs=3, start_id=0, context_length=4)
    assert (model.input_dropout.p, model.output_dropout.p, model.word_dropout.p) == (0.4, 0.1, 0.0)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_residual_path_skips_the_dropout_between_layers(tiny: Callable[..., LanguageModel], cell: str) -> None:
    model = tiny(cell, embedding_size=8, residual=True, layer_dropout=0.9).train()
    with torch.no_grad():
        for parameter in model.body.layers[1].parameters():
            parameter.zero_()  # the second layer then adds 0, or for a GRU a share of h = 0
        if cell in MINIMAL_CELLS:
            model.body.layers[1].weights.bias_ih_l0[-8:] = -1000.0  # g of it is 0
    one = tiny(cell, embedding_size=8, residual=True, num_layers=1)
    one.load_state_dict(model.state_dict(), strict=False)
    tokens_BT = torch.randint(7, (4, 6))
    torch.testing.assert_close(model.features(tokens_BT).raw_BTH, one.features(tokens_BT).raw_BTH)
