"""The fast kernels, by kind of recurrence: over a window, and for a single step.

The kinds are those of cells.py, whose equations these compute.

Shape suffixes: B batch, T time steps, I input, H hidden, G gates × hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.models.scan import GATES, linear_recurrence, minimal_gates

LayerState = tuple[Tensor, ...]
"""The h of a layer, and for the LSTM its c too; each (B, H)."""

Weights = list[Tensor]
"""weight_ih (G, I), weight_hh (G, H), bias_ih (G), bias_hh (G); the minimal cells' hh have no rows."""

Window = Callable[[Tensor, LayerState, Weights, bool], tuple[Tensor, LayerState]]
Step = Callable[[Tensor, LayerState, Weights], LayerState]


class ResetBeforeGRU(nn.Module):
    """Weights of the textbook's GRU, under the names and layouts of torch.nn.GRU."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size))


class MinimalWeights(nn.Module):
    """Weights of a cell whose gates do not see the state: nothing multiplies it, and no second bias is added."""

    weight_hh_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int, *, gates: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates * hidden_size, input_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(gates * hidden_size))
        self.register_buffer("weight_hh_l0", torch.empty(0, hidden_size), persistent=False)
        self.register_buffer("bias_hh_l0", torch.empty(0), persistent=False)


def _lstm_window(x_BTI: Tensor, state: LayerState, weights: Weights, training: bool) -> tuple[Tensor, LayerState]:
    carry = [part.unsqueeze(0).contiguous() for part in state]  # cuDNN takes no expanded rows
    out_BTH, h_1BH, c_1BH = torch.lstm(x_BTI, carry, weights, True, 1, 0.0, training, False, True)
    return out_BTH, (h_1BH[0], c_1BH[0])


def _single_state_window(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Window:
    def window(x_BTI: Tensor, state: LayerState, weights: Weights, training: bool) -> tuple[Tensor, LayerState]:
        carry = state[0].unsqueeze(0).contiguous()
        out_BTH, h_1BH = kernel(x_BTI, carry, weights, True, 1, 0.0, training, False, True)
        return out_BTH, (h_1BH[0],)

    return window


def _gru_reset_before_window(
    x_BTI: Tensor, state: LayerState, weights: Weights, training: bool
) -> tuple[Tensor, LayerState]:
    """The textbook's GRU over a window: a loop over time, for no kernel computes it.

    The input's product needs no state, so that all steps make one matrix product. Both hidden
    biases join it too: in this form neither is inside the reset gate's reach.
    """
    (h_BH,) = state
    kept, hidden_size = h_BH.dtype, h_BH.shape[1]
    x_TBG = F.linear(x_BTI.transpose(0, 1), weights[0], weights[2] + weights[3])
    gates_x_TBG, candidate_x_TBH = torch.split(x_TBG, [2 * hidden_size, hidden_size], dim=-1)
    weight_hh_HG = weights[1].to(x_TBG.dtype).t()
    weight_gates_HG, weight_candidate_HH = torch.split(weight_hh_HG, [2 * hidden_size, hidden_size], dim=1)
    outputs = []
    for gates_x_BG, candidate_x_BH in zip(gates_x_TBG.unbind(), candidate_x_TBH.unbind(), strict=True):
        r_BH, z_BH = torch.addmm(gates_x_BG, h_BH, weight_gates_HG).sigmoid().chunk(2, dim=1)
        candidate_BH = torch.addmm(candidate_x_BH, r_BH * h_BH, weight_candidate_HH).tanh()
        h_BH = torch.lerp(h_BH, candidate_BH.to(kept), z_BH.to(kept))  # under autocast, h stays whole
        outputs.append(h_BH)
    return torch.stack(outputs, dim=1), (h_BH,)


def _minimal_window(kind: str) -> Window:
    def window(x_BTI: Tensor, state: LayerState, weights: Weights, training: bool) -> tuple[Tensor, LayerState]:
        keep_BTH, add_BTH = minimal_gates(kind, F.linear(x_BTI, weights[0], weights[2]))
        out_BTH = linear_recurrence(keep_BTH, add_BTH, state[0].to(keep_BTH.dtype))
        return out_BTH, (out_BTH[:, -1],)

    return window


def _minimal_step(kind: str) -> Step:
    def step(x_BI: Tensor, state: LayerState, weights: Weights) -> LayerState:
        keep_BH, add_BH = minimal_gates(kind, F.linear(x_BI, weights[0], weights[2]))
        return (torch.addcmul(add_BH, keep_BH, state[0].to(keep_BH.dtype)),)

    return step


def _lstm_step(x_BI: Tensor, state: LayerState, weights: Weights) -> LayerState:
    return torch.lstm_cell(x_BI, state, *weights)


def _single_state_step(kernel: Callable[..., Tensor]) -> Step:
    return lambda x_BI, state, weights: (kernel(x_BI, state[0], *weights),)


def _gru_reset_before_step(x_BI: Tensor, state: LayerState, weights: Weights) -> LayerState:
    return _gru_reset_before_window(x_BI.unsqueeze(1), state, weights, False)[1]


WEIGHT_HOLDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda input_size, hidden_size: nn.RNN(input_size, hidden_size, nonlinearity="relu"),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "gru_reset_before": ResetBeforeGRU,
    "mingru": partial(MinimalWeights, gates=GATES["mingru"]),
    "minlstm": partial(MinimalWeights, gates=GATES["minlstm"]),
}
WINDOWS: dict[str, Window] = {
    "rnn_tanh": _single_state_window(torch.rnn_tanh),
    "rnn_relu": _single_state_window(torch.rnn_relu),
    "lstm": _lstm_window,
    "gru": _single_state_window(torch.gru),
    "gru_reset_before": _gru_reset_before_window,
    "mingru": _minimal_window("mingru"),
    "minlstm": _minimal_window("minlstm"),
}
STEPS: dict[str, Step] = {  # oneDNN's LSTM takes 5 times as long
    "rnn_tanh": _single_state_step(torch.rnn_tanh_cell),
    "rnn_relu": _single_state_step(torch.rnn_relu_cell),
    "lstm": _lstm_step,
    "gru": _single_state_step(torch.gru_cell),
    "gru_reset_before": _gru_reset_before_step,
    "mingru": _minimal_step("mingru"),
    "minlstm": _minimal_step("minlstm"),
}
