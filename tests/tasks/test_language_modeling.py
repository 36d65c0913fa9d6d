from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.config.schema import MINIMAL_CELLS, RECURRENT_CELLS, ModelConfig, OptimizerConfig
from elman.data.windows import Window, WindowLoader
from elman.errors import DivergenceError
from elman.models.language_model import LanguageModel, build_model
from elman.tasks.language_modeling import LanguageModeling, evaluate, summed_loss, unroll

V = 9
CPU = torch.device("cpu")


def network(cell: str = "lstm", **settings: Any) -> LanguageModel:
    torch.manual_seed(1)
    config = ModelConfig(**{"cell": cell, "embedding_size": 6, "hidden_size": 8, "num_heads": 2} | settings)
    return build_model(config, vocabulary_size=V, num_inputs=V + 1, start_id=V, context_length=64).double()


def windows(count: int = 60, **named: Any) -> WindowLoader:
    tokens = np.random.default_rng(0).integers(0, V, count).astype(np.uint8)
    settings = {"batch_size": 3, "sequence_length": 5, "start_id": V} | named
    return WindowLoader(tokens, **settings)


class Unit:
    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token

    def bits_per_character(self, nats_per_token: float) -> float:
        return nats_per_token


class Trained(LanguageModeling):
    """A task outside of a Trainer."""

    def __init__(self, model: LanguageModel, **settings: Any) -> None:
        super().__init__(model, OptimizerConfig(**settings), bits=Unit(), sequence_length=5)
        optimizers = [torch.optim.SGD(model.parameters())]
        self._trainer = SimpleNamespace(global_step=6, sanity_checking=False, optimizers=optimizers)

    @property
    def trainer(self) -> Any:
        return self._trainer

    @trainer.setter
    def trainer(self, value: Any) -> None:
        self._trainer = value


@pytest.mark.parametrize("cell", [*RECURRENT_CELLS, "transformer"])
def test_carried_windows_score_a_text_as_one_long_window_does(cell: str) -> None:
    model = network(cell)
    short = evaluate(model, windows(60, batch_size=1, sequence_length=7), CPU, "fp32")
    long = evaluate(model, windows(60, batch_size=1, sequence_length=60), CPU, "fp32")
    assert short.loss == pytest.approx(long.loss, abs=1e-6)
    assert (short.accuracy, short.tokens) == (long.accuracy, 60)


def test_no_gradient_crosses_the_border_of_a_window() -> None:
    task = Trained(network())
    first, second, *_ = windows()
    task.training_step(first, 0)
    carry = task._carry
    assert carry is not None
    assert not any(tensor.requires_grad for layer in carry for tensor in layer)
    probe = tuple(tuple(t.clone().requires_grad_() for t in layer) for layer in carry)
    task._carry = probe
    task.training_step(second, 1)["loss"].backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for layer in probe for t in layer)
    assert not any(t.requires_grad for layer in task._carry for t in layer)


def test_the_carry_of_one_window_enters_the_next_and_a_new_pass_starts_without_it() -> None:
    task = Trained(network())
    first, second, *_ = windows()
    alone = task.training_step(second._replace(is_first=True), 0)["nats"]
    task.training_step(first, 0)
    carried = task.training_step(second, 1)["nats"]
    assert not torch.equal(alone, carried)
    again = task.training_step(second._replace(is_first=True), 0)["nats"]
    assert torch.equal(alone, again)
    task.training_step(first, 0)
    task.on_train_epoch_start()
    assert torch.equal(task.training_step(second, 0)["nats"], alone)


def test_no_tokens_loss_depends_on_later_tokens() -> None:
    model = network("gru")
    [window] = windows(20, batch_size=1, sequence_length=20)
    changed = window.inputs_BT.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % V

    def losses(inputs: Tensor) -> Tensor:
        logits, _ = model(inputs)
        return torch.nn.functional.cross_entropy(logits[0], window.targets_BT[0], reduction="none")

    before, after = losses(window.inputs_BT), losses(changed)
    assert torch.equal(before[:12], after[:12])
    assert not torch.equal(before[12:], after[12:])


def test_validation_carries_its_own_state_and_leaves_trainings_untouched() -> None:
    task = Trained(network())
    first, second, *_ = windows()
    task.training_step(first, 0)
    carry = task._carry
    task.on_validation_start()
    for index, window in enumerate(windows(40)):
        task.validation_step(window, index)
    task.on_validation_epoch_end()
    assert task._carry is carry
    assert task.validation is not None
    assert task.validation.loss == pytest.approx(evaluate(task.model, windows(40), CPU, "fp32").loss, abs=1e-9)
    after = task.training_step(second, 1)["nats"]
    undisturbed = Trained(network())
    undisturbed.training_step(first, 0)
    assert torch.equal(after, undisturbed.training_step(second, 1)["nats"])


@pytest.mark.parametrize("cell", ["lstm", "gru", "transformer"])
def test_a_document_border_makes_a_document_independent_of_the_one_before(cell: str) -> None:
    model = network(cell)
    starts = np.array([0, 8])
    whole = list(windows(20, batch_size=1, sequence_length=20, document_starts=starts))
    _, logits, _ = unroll(model, whole[0], None)
    tokens = whole[0].targets_BT[0, 8:]
    alone = Window(torch.cat([torch.tensor([V]), tokens[:-1]])[None], tokens[None], None, True)
    _, expected, _ = unroll(model, alone, None)
    assert torch.allclose(logits[:, 8:], expected, atol=1e-12)


def test_the_loss_skips_positions_without_a_target() -> None:
    logits = torch.randn(2, 3, V)
    targets = torch.tensor([[1, 2, 3], [4, 5, -100]])
    kept = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[:5], targets.flatten()[:5], reduction="sum")
    assert torch.allclose(summed_loss(logits, targets), kept)


def test_the_loss_does_not_depend_on_the_order_in_memory() -> None:
    logits, targets = torch.randn(2, 3, V).double(), torch.tensor([[1, 2, 3], [4, 5, -100]])
    time_major = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.allclose(summed_loss(time_major, targets), summed_loss(logits, targets), atol=1e-12)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
@pytest.mark.parametrize("settings", [{}, {"initial_state": "learned", "num_layers": 2, "layer_norm": True}], ids=str)
def test_gradients_in_bf16_are_those_of_single_precision_across_document_borders(
    cell: str, settings: dict[str, Any]
) -> None:
    model = network(cell, hidden_size=24, **settings).float()
    starts = np.array([0, 8, 31, 60])
    window = next(iter(windows(120, batch_size=4, sequence_length=30, document_starts=starts)))
    assert window.resets_BT is not None

    def gradients() -> Tensor:
        model.zero_grad()
        _, dropped, _ = unroll(model, window, None)
        summed_loss(model.project(dropped), window.targets_BT).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    limit = 0.05 if cell in MINIMAL_CELLS else 0.03  # the slope of their g jumps where rounding decides
    assert (found - expected).norm() < limit * expected.norm()


def test_activation_regularisation_adds_what_its_formulas_say() -> None:
    [window] = windows(30, batch_size=3, sequence_length=10)
    plain = Trained(network()).training_step(window, 0)
    both = Trained(network(), activation_regularization=2.0, temporal_activation_regularization=3.0)
    penalised = both.training_step(window, 0)
    raw, dropped, _ = unroll(network(), window, None)
    expected = 2 * dropped.pow(2).mean() + 3 * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
    assert torch.allclose(penalised["loss"] - plain["loss"], expected, atol=1e-12)
    assert torch.equal(penalised["nats"], plain["nats"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_remedies(value: float) -> None:
    model = network()
    with torch.no_grad():
        model.output_bias.fill_(value)
    with pytest.raises(DivergenceError, match=r"at step 7\. Usual remedies: lower optimizer\.lr"):
        Trained(model).training_step(next(iter(windows())), 0)


def test_bf16_scores_within_half_a_percent_of_single_precision() -> None:
    model = network(hidden_size=32).float()
    single = evaluate(model, windows(300), CPU, "fp32").loss
    half = evaluate(model, windows(300), CPU, "bf16").loss
    assert half == pytest.approx(single, rel=5e-3)
    assert half != single


def test_evaluation_leaves_the_models_mode_alone() -> None:
    model = network(dropout=0.5).train()
    first = evaluate(model, windows(), CPU, "fp32")
    assert model.training
    assert evaluate(model, windows(), CPU, "fp32") == first
