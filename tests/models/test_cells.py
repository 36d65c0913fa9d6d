"""The fast kernels compute what cells.py writes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elman.config.schema import MINIMAL_CELLS, ModelConfig
from elman.errors import ConfigError
from elman.models.cells import CELLS, CellWeights, unroll
from elman.models.recurrent import RecurrentLayer
from kernel_support import random_layer, weights_of

B, T, I, H = 3, 5, 4, 6  # noqa: E741
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3, "mingru": 2, "minlstm": 3}
WITH_RECURRENT_WEIGHTS = [kind for kind in CELLS if kind not in MINIMAL_CELLS]


def inputs_of(kind: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    x_BTI = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    num_states = 2 if kind == "lstm" else 1
    return x_BTI, tuple(torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in range(num_states))


@pytest.mark.parametrize("kind", CELLS)
def test_kernel_equals_written_out_cell_forward_and_in_every_gradient(kind: str) -> None:
    layer = random_layer(kind, I, H)
    weights = weights_of(layer)
    leaves = [weight for weight in weights if weight.requires_grad]
    x_BTI, state = inputs_of(kind)
    found_BTH, found_state = layer(x_BTI, state)
    expected_BTH, expected_state = unroll(CELLS[kind], x_BTI, state, weights)
    torch.testing.assert_close(found_BTH, expected_BTH, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_state, expected_state, rtol=0, atol=1e-10)

    def gradients(out_BTH: Tensor, last: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors = torch.linspace(-1, 1, out_BTH.numel(), dtype=torch.float64).view_as(out_BTH)
        loss = (out_BTH * factors).sum() + sum((part**2).sum() for part in last)
        return torch.autograd.grad(loss, (x_BTI, *state, *leaves))

    for found, expected in zip(
        gradients(found_BTH, found_state), gradients(expected_BTH, expected_state), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", CELLS)
def test_single_step_kernel_equals_written_out_cell(kind: str) -> None:
    layer = random_layer(kind, I, H)
    x_BTI, state = inputs_of(kind)
    with torch.no_grad():
        found_BTH, found_state = layer(x_BTI[:, :1], state)
        expected_state = CELLS[kind](x_BTI[:, 0], state, weights_of(layer))
    torch.testing.assert_close(found_state, expected_state, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_BTH[:, 0], expected_state[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", CELLS)
def test_written_out_cell_passes_gradcheck(kind: str) -> None:
    torch.manual_seed(1)
    rows = GATES[kind] * 3
    recurrent_rows = 0 if kind in MINIMAL_CELLS else rows

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    weights = (random(rows, 2), random(recurrent_rows, 3), random(rows), random(recurrent_rows))
    state = tuple(random(2, 3) for _ in range(2 if kind == "lstm" else 1))

    def step(x_BI: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return CELLS[kind](x_BI, rest[: len(state)], CellWeights(*rest[len(state) :]))

    assert torch.autograd.gradcheck(step, (random(2, 2), *state, *weights))


def test_the_two_grus_agree_once_z_is_negated_and_r_is_open() -> None:
    torch.manual_seed(2)
    weights = [torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.zeros(3 * H)]
    x_BI, h_BH = torch.randn(B, I), torch.randn(B, H)
    for weight in weights:
        weight[:H] = 0
    weights[2][:H] = 50.0  # r = 1, so that its place makes no difference
    negated = [weight.clone() for weight in weights]
    for weight in negated:
        weight[H : 2 * H] *= -1
    torch.testing.assert_close(
        CELLS["gru"](x_BI, (h_BH,), CellWeights(*weights)),
        CELLS["gru_reset_before"](x_BI, (h_BH,), CellWeights(*negated)),
    )


def test_the_two_minimal_cells_agree_once_the_input_gate_is_what_the_forget_gate_leaves() -> None:
    torch.manual_seed(2)
    weight_z_HI, weight_h_HI = torch.randn(H, I), torch.randn(H, I)
    bias_ih, weight_hh, bias_hh = torch.zeros(3 * H), torch.empty(0, H), torch.empty(0)
    mingru = CellWeights(torch.cat((weight_z_HI, weight_h_HI)), weight_hh, bias_ih[: 2 * H], bias_hh)
    # σ(−x) + σ(x) = 1: the sum by which the minLSTM divides makes no difference then.
    minlstm = CellWeights(torch.cat((-weight_z_HI, weight_z_HI, weight_h_HI)), weight_hh, bias_ih, bias_hh)
    x_BI, h_BH = torch.randn(B, I), torch.randn(B, H)
    torch.testing.assert_close(CELLS["minlstm"](x_BI, (h_BH,), minlstm), CELLS["mingru"](x_BI, (h_BH,), mingru))


@pytest.mark.parametrize("kind", MINIMAL_CELLS)
def test_weight_dropout_of_a_cell_without_recurrent_weights_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelConfig(cell=kind, weight_dropout=0.1)
    assert str(refused.value) == (
        f"model.weight_dropout must be 0 with model.cell {kind}, which has no recurrent weights, got 0.1."
    )


@pytest.mark.parametrize("kind", WITH_RECURRENT_WEIGHTS)
def test_weight_dropout_draws_one_mask_for_the_window_and_reaches_the_raw_weight(kind: str) -> None:
    layer = random_layer(kind, I, H, weight_dropout=0.5)
    x_BTI, state = inputs_of(kind)
    torch.manual_seed(3)
    found_BTH, _ = layer(x_BTI, state)
    torch.manual_seed(3)
    weights = weights_of(layer)
    dropped = weights._replace(weight_hh=torch.nn.functional.dropout(weights.weight_hh, 0.5))
    expected_BTH, _ = unroll(CELLS[kind], x_BTI, state, dropped)
    torch.testing.assert_close(found_BTH, expected_BTH, rtol=0, atol=1e-10)
    found = torch.autograd.grad(found_BTH.sum(), weights.weight_hh)[0]
    expected = torch.autograd.grad(expected_BTH.sum(), weights.weight_hh)[0]
    assert (found == 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", WITH_RECURRENT_WEIGHTS)
def test_weight_dropout_leaves_evaluation_alone(kind: str) -> None:
    layer = random_layer(kind, I, H, weight_dropout=0.5).eval()
    x_BTI, state = inputs_of(kind)
    expected_BTH, _ = unroll(CELLS[kind], x_BTI, state, weights_of(layer))
    torch.testing.assert_close(layer(x_BTI, state)[0], expected_BTH, rtol=0, atol=1e-10)


def test_forget_bias_is_what_the_two_biases_of_the_forget_gate_sum_to() -> None:
    layer = RecurrentLayer(ModelConfig(cell="lstm", forget_bias=1.5), I, H)
    bias = layer.weights.bias_ih_l0 + layer.weights.bias_hh_l0
    assert bias[H : 2 * H].tolist() == [1.5] * H
    assert bias[:H].abs().sum() + bias[2 * H :].abs().sum() == 0
    minimal = RecurrentLayer(ModelConfig(cell="minlstm", forget_bias=1.5), I, H)
    assert minimal.weights.bias_ih_l0[: 2 * H].tolist() == [1.5] * H + [0.0] * H


@pytest.mark.parametrize("kind", MINIMAL_CELLS)
def test_units_of_a_minimal_cell_differ_where_the_input_is_nothing(kind: str) -> None:
    layer = RecurrentLayer(ModelConfig(cell=kind), I, 64)
    out_BTH, _ = layer(torch.zeros(1, 1, I), (torch.zeros(1, 64),))
    assert out_BTH.std() > 0.05  # else a layer norm would divide by it


@pytest.mark.parametrize("kind", WITH_RECURRENT_WEIGHTS)
def test_recurrent_blocks_start_orthogonal(kind: str) -> None:
    cell, _, nonlinearity = kind.partition("_") if kind.startswith("rnn") else (kind, "", "tanh")
    layer = RecurrentLayer(ModelConfig(cell=cell, nonlinearity=nonlinearity), I, H)
    for block in layer.weights.weight_hh_l0.detach().split(H):
        torch.testing.assert_close(block @ block.T, torch.eye(H), rtol=0, atol=1e-5)
    if kind == "rnn_relu":
        assert torch.equal(layer.weights.weight_hh_l0.detach(), torch.eye(H))


@pytest.mark.parametrize("kind", CELLS)
def test_bf16_autocast_runs_with_gradients_and_a_carry(kind: str) -> None:
    layer = random_layer(kind, I, H).float()
    x_BTI = torch.randn(B, T, I)
    with torch.autocast("cpu", torch.bfloat16):
        out_BTH, state = layer(x_BTI, tuple(part.expand(B, H) for part in layer.initial_state()))
        again_BTH, _ = layer(out_BTH[..., :I], state)
    again_BTH.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.weights.parameters())
    expected_BTH, _ = layer(x_BTI, tuple(part.expand(B, H) for part in layer.initial_state()))
    torch.testing.assert_close(out_BTH.float(), expected_BTH, rtol=0.05, atol=0.05)
