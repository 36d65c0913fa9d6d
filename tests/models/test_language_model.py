"""The interface that every architecture keeps: carry, causality, reset, tied weights, round trip."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elman.config.schema import RECURRENT_CELLS, ModelConfig
from elman.errors import ModelError
from elman.models.language_model import LanguageModel
from elman.models.state import detach, map_state, select, to_device

CELLS = (*RECURRENT_CELLS, "transformer")
VARIANTS = [
    *[{"cell": cell} for cell in CELLS],
    *[{"cell": cell, "layer_norm": True} for cell in RECURRENT_CELLS],
    *[{"cell": cell, "residual": True, "embedding_size": 8} for cell in RECURRENT_CELLS],
    *[{"cell": cell, "initial_state": "learned"} for cell in RECURRENT_CELLS],
    *[{"cell": cell, "head": "last_step", "max_sequence_length": 3} for cell in CELLS],
    {"cell": "lstm", "head": "last_step", "max_sequence_length": 1},
    {"cell": "rnn", "nonlinearity": "relu", "last_hidden_size": 5, "tie_weights": True},
    {"cell": "lstm", "layer_norm": True, "residual": True, "initial_state": "learned", "last_hidden_size": 6},
    {"cell": "transformer", "embedding_size": 8, "tie_weights": True},
    {"cell": "gru", "softmax": "adaptive", "cutoffs": (2, 5)},
]
every_variant = pytest.mark.parametrize(
    "settings", VARIANTS, ids=lambda settings: "-".join(str(value) for value in settings.values())
)
Tiny = Callable[..., LanguageModel]


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(5))


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@every_variant
def test_two_carried_windows_equal_one_long_window(tiny: Tiny, settings: dict[str, object]) -> None:
    model = tiny(**settings)
    tokens_BT = tokens(3, 11)
    whole_BTV, last = model(tokens_BT)
    first_BTV, state = model(tokens_BT[:, :6])
    second_BTV, carried = model(tokens_BT[:, 6:], detach(state))
    assert_same(torch.cat((first_BTV, second_BTV), dim=1), whole_BTV)
    assert_same(carried, last)


@every_variant
def test_stepwise_logits_equal_the_whole_forward_pass(tiny: Tiny, settings: dict[str, object]) -> None:
    model = tiny(**settings)
    tokens_BT = tokens(2, 9)
    with torch.inference_mode():
        whole_BTV, _ = model(tokens_BT)
        state = None
        for step in range(9):
            logits_B1V, state = model(tokens_BT[:, step : step + 1], state)
            assert_same(logits_B1V[:, 0], whole_BTV[:, step])


@every_variant
def test_no_output_depends_on_later_tokens(tiny: Tiny, settings: dict[str, object]) -> None:
    model = tiny(**settings)
    tokens_BT = tokens(2, 8)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % 7
    before_BTV, after_BTV = model(tokens_BT)[0], model(changed_BT)[0]
    assert torch.equal(before_BTV[:, :5], after_BTV[:, :5])
    assert not torch.allclose(before_BTV[:, 5], after_BTV[:, 5])


@every_variant
def test_reset_rows_start_afresh_and_the_others_go_on(tiny: Tiny, settings: dict[str, object]) -> None:
    model = tiny(**settings)
    tokens_BT, next_BT = tokens(3, 5), tokens(3, 4).flip(0)
    _, state = model(tokens_BT)
    found_BTV, _ = model(next_BT, model.reset(state, torch.tensor([True, False, True])))
    assert_same(found_BTV[[0, 2]], model(next_BT)[0][[0, 2]])
    assert_same(found_BTV[1], model(next_BT, state)[0][1])


@pytest.mark.parametrize("lengths", [(11, 6), (1, 1, 3, 1)], ids=str)
@pytest.mark.parametrize(
    "settings", [settings for settings in VARIANTS if "head" not in settings], ids=lambda settings: str(settings)
)
def test_resets_within_windows_equal_windows_cut_at_the_resets(
    tiny: Tiny, settings: dict[str, object], lengths: tuple[int, ...]
) -> None:
    model = tiny(**settings)
    tokens_BT = tokens(3, sum(lengths))
    resets_BT = torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(1)) < 0.25
    resets_BT[0, 0] = resets_BT[1, -1] = True

    def whole() -> Tensor:
        outputs, state = [], None
        for window_BT, where_BT in zip(tokens_BT.split(lengths, 1), resets_BT.split(lengths, 1), strict=True):
            features = model.features(window_BT, state, where_BT)
            outputs.append(features.raw_BTH)
            state = features.state
        return torch.cat(outputs, 1)

    def cut() -> Tensor:
        outputs, state = [], model.initial_state(3)
        for step in range(tokens_BT.shape[1]):
            features = model.features(tokens_BT[:, step : step + 1], model.reset(state, resets_BT[:, step]))
            outputs.append(features.raw_BTH)
            state = features.state
        return torch.cat(outputs, 1)

    found_BTH, expected_BTH = whole(), cut()
    assert_same(found_BTH, expected_BTH)
    factors, leaves = torch.randn_like(found_BTH), [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((out_BTH * factors).sum(), leaves, allow_unused=True)
        for out_BTH in (found_BTH, expected_BTH)
    )
    assert any(gradient is not None for gradient in theirs)
    for gradient, exact in zip(ours, theirs, strict=True):
        assert (gradient is None) == (exact is None)
        if exact is not None:
            assert_same(gradient, exact)
    with torch.inference_mode():
        assert_same(whole(), expected_BTH)


@every_variant
def test_rebuilt_from_its_architecture_and_weights_it_is_the_same_model(
    tiny: Tiny, settings: dict[str, object]
) -> None:
    model = tiny(**settings)
    rebuilt = LanguageModel.from_architecture(json.loads(json.dumps(model.architecture))).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.architecture == model.architecture
    assert rebuilt.config == model.config
    assert torch.equal(rebuilt(tokens(2, 5))[0], model(tokens(2, 5))[0])


@every_variant
def test_every_parameter_gets_a_gradient(tiny: Tiny, settings: dict[str, object]) -> None:
    model = tiny(**settings).train()
    model(tokens(3, 6))[0].logsumexp(dim=-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("cell", CELLS)
def test_every_tensor_of_the_carry_is_batch_first_and_rows_can_be_selected(tiny: Tiny, cell: str) -> None:
    model = tiny(cell)
    _, state = model(tokens(3, 5))
    shapes: list[int] = []
    map_state(lambda tensor: shapes.append(tensor.shape[0]) or tensor, state)
    assert set(shapes) == {3}
    rows = torch.tensor([2, 0, 0, 1])
    found_BTV, _ = model(tokens(4, 2), select(to_device(state, "cpu"), rows))
    for row, source in enumerate(rows.tolist()):
        one = select(state, torch.tensor([source]))
        assert_same(found_BTV[row : row + 1], model(tokens(4, 2)[row : row + 1], one)[0])


def test_detached_carry_lets_no_gradient_across_the_border(tiny: Tiny) -> None:
    model = tiny("lstm")
    _, state = model(tokens(2, 3))
    assert state[0][0].requires_grad
    assert not any(tensor.requires_grad for part in detach(state) for tensor in part)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_learned_initial_state_is_learned_and_zero_one_has_no_parameters(tiny: Tiny, cell: str) -> None:
    learned, zero = tiny(cell, initial_state="learned"), tiny(cell)
    assert len(list(learned.parameters())) - len(list(zero.parameters())) == (4 if cell == "lstm" else 2)
    assert all((tensor == 0).all() for part in zero.initial_state(2) for tensor in part)
    learned(tokens(2, 3))[0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for layer in learned.body.layers for parameter in layer.initial)


@pytest.mark.parametrize("sizes", [{"hidden_size": 6}, {"hidden_size": 8}, {"last_hidden_size": 6}])
def test_tied_output_shares_the_embedding_s_storage(tiny: Tiny, sizes: dict[str, int]) -> None:
    model = tiny("lstm", tie_weights=True, embedding_size=6, **sizes)
    assert model.output_weight is None
    assert (model.projection is None) == (model.body.output_size == 6)
    one_hot_E = torch.zeros(6, dtype=torch.float64)
    one_hot_E[2] = 1
    model.projection = None
    logits_V = model.project(one_hot_E)
    assert_same(logits_V, model.embedding.weight[:7, 2] + model.output_bias)
    with torch.no_grad():
        model.embedding.weight[:7, 2] += 1
    assert_same(model.project(one_hot_E), logits_V + 1)
    assert len(model.state_dict()) == len(list(model.parameters()))  # stored once


def test_start_symbol_of_its_own_is_zeros_and_never_predicted() -> None:
    model = LanguageModel.from_architecture(
        {"config": {"variational": []}, "vocabulary_size": 5, "num_inputs": 6, "start_id": 5, "context_length": 3}
    )
    assert (model.embedding.weight[5] == 0).all()
    assert (model.embedding.weight[:5] != 0).all()
    assert model(torch.tensor([[5]]))[0].shape == (1, 1, 5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding_size", [64, 96])
def test_untrained_loss_is_near_that_of_a_uniform_guess(cell: str, tied: bool, embedding_size: int) -> None:
    torch.manual_seed(1)
    config = ModelConfig(cell=cell, hidden_size=64, embedding_size=embedding_size, tie_weights=tied)
    model = LanguageModel(config, vocabulary_size=50, num_inputs=51, start_id=50, context_length=8)
    tokens_BT = torch.randint(50, (16, 32))
    logits_BTV, _ = model(tokens_BT)
    loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert abs(loss.item() - math.log(50)) < 1


def test_time_major_features_are_projected_to_the_same_logits(tiny: Tiny) -> None:
    model = tiny("lstm", tie_weights=True)
    features_TBH = torch.randn(5, 3, 8, dtype=torch.float64)
    logits_BTV = model.project(features_TBH.transpose(0, 1))
    assert logits_BTV.transpose(0, 1).is_contiguous()
    assert_same(logits_BTV, model.project(features_TBH.transpose(0, 1).contiguous()))


def test_last_step_pads_with_the_start_symbol(tiny: Tiny) -> None:
    model = tiny("gru", head="last_step", max_sequence_length=4)
    every = tiny("gru")
    every.load_state_dict(model.state_dict())
    tokens_BT = tokens(2, 3)
    padded_BT = torch.cat((torch.full((2, 3), model.start_id), tokens_BT), dim=1)
    for step in range(3):
        window_BT = padded_BT[:, step : step + 4]
        assert_same(model(tokens_BT)[0][:, step], every(window_BT)[0][:, -1])


def test_carry_of_another_batch_size_is_caught(tiny: Tiny) -> None:
    model = tiny("lstm")
    with pytest.raises(AssertionError, match="another batch size"):
        model(tokens(2, 3), model.initial_state(3))


def test_architecture_of_another_version_is_refused_in_one_line(tiny: Tiny) -> None:
    architecture = tiny("lstm").architecture
    architecture["config"]["flux"] = 1
    with pytest.raises(ModelError, match=r"does not fit this version.*flux"):
        LanguageModel.from_architecture(architecture)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("head", ["every_step", "last_step"])
def test_bf16_autocast_carries_over_windows_and_stays_close(tiny: Tiny, cell: str, head: str) -> None:
    model = tiny(cell, head=head, max_sequence_length=3).float()
    with torch.autocast("cpu", torch.bfloat16):
        first_BTV, state = model(tokens(2, 4))
        second_BTV, _ = model(tokens(2, 4), model.reset(detach(state), torch.tensor([True, False])))
        second_BTV.float().sum().backward()
    torch.testing.assert_close(first_BTV.float(), model(tokens(2, 4))[0], rtol=0.1, atol=0.2)
    assert model.embedding.weight.grad is not None
