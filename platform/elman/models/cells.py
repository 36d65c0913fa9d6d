"""The recurrences, written out one step at a time.

These are the equations that the fast kernels of recurrent.py are tested against, forward
and backward. Weights have torch's names and layouts: the rows of a matrix are its gates
stacked in torch's order, i f g o for the LSTM and r z n for the GRU; z h̃ for the minGRU and
f i h̃ for the minLSTM, in which no weight meets the state.

Shape suffixes: B batch, T time steps, I input, H hidden, G gates × hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CellWeights(NamedTuple):
    """Parameters of one recurrent layer: (G, I), (G, H), (G) and (G).

    weight_hh and bias_hh have no rows where a cell has no weights on its state.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor


CellState = tuple[Tensor, ...]
"""The h of a layer, and for the LSTM its c too; each (B, H)."""

Cell = Callable[[Tensor, CellState, CellWeights], CellState]


def rnn_tanh_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the simple recurrent network: h_t = tanh(W_hh h_{t-1} + W_xh x_t + b_h).

    The b_h of the equation is bias_ih + bias_hh: torch keeps two vectors where one would do.

    Source: Elman (1990), Finding Structure in Time, Cognitive Science 14(2).
    """
    (h_BH,) = state
    return (torch.tanh(_affine(x_BI, h_BH, weights)),)


def rnn_relu_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the rectified network: h_t = max(0, W_hh h_{t-1} + W_xh x_t + b_h).

    Source: Le, Jaitly & Hinton (2015), arXiv:1504.00941.
    """
    (h_BH,) = state
    return (torch.relu(_affine(x_BI, h_BH, weights)),)


def lstm_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the LSTM.

    ::

        i = σ(W_xi x_t + W_hi h_{t-1} + b_i)        f = σ(W_xf x_t + W_hf h_{t-1} + b_f)
        o = σ(W_xo x_t + W_ho h_{t-1} + b_o)        g = tanh(W_xg x_t + W_hg h_{t-1} + b_g)
        C_t = f ⊙ C_{t-1} + i ⊙ g                   h_t = o ⊙ tanh(C_t)

    Source: Hochreiter & Schmidhuber (1997), Long Short-Term Memory, Neural Computation 9(8);
    the forget gate f is from Gers, Schmidhuber & Cummins (2000), Learning to Forget,
    Neural Computation 12(10).
    """
    h_BH, c_BH = state
    i_BH, f_BH, g_BH, o_BH = _affine(x_BI, h_BH, weights).chunk(4, dim=-1)
    c_BH = torch.sigmoid(f_BH) * c_BH + torch.sigmoid(i_BH) * torch.tanh(g_BH)
    return torch.sigmoid(o_BH) * torch.tanh(c_BH), c_BH


def gru_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the GRU as torch (and cuDNN) computes it.

    ::

        r = σ(W_xr x_t + b_xr + W_hr h_{t-1} + b_hr)
        z = σ(W_xz x_t + b_xz + W_hz h_{t-1} + b_hz)
        n = tanh(W_xn x_t + b_xn + r ⊙ (W_hn h_{t-1} + b_hn))
        h_t = (1−z) ⊙ n + z ⊙ h_{t-1}

    It differs from the textbook's (``gru_reset_before_cell``) in two ways:

    1. r gates the *product* W_hn h_{t-1} + b_hn, where the textbook's gates h_{t-1} before it
       is multiplied. That frees the three recurrent products from waiting for r, so that they
       run as one; the functions that the two can compute are not the same.
    2. z is the share of the *old* state that is kept, where the textbook's z is the share of
       the candidate that is let in. This one is only a name: negating W_xz, W_hz and their
       biases turns either into the other.

    Source: Cho et al. (2014), arXiv:1406.1078, whose first version resets after the product
    and whose third before it; the form here is that of torch.nn.GRU's documentation.
    """
    (h_BH,) = state
    xr_BH, xz_BH, xn_BH = (x_BI @ weights.weight_ih.T + weights.bias_ih).chunk(3, dim=-1)
    hr_BH, hz_BH, hn_BH = (h_BH @ weights.weight_hh.T + weights.bias_hh).chunk(3, dim=-1)
    r_BH = torch.sigmoid(xr_BH + hr_BH)
    z_BH = torch.sigmoid(xz_BH + hz_BH)
    n_BH = torch.tanh(xn_BH + r_BH * hn_BH)
    return ((1 - z_BH) * n_BH + z_BH * h_BH,)


def gru_reset_before_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the textbook's GRU, whose reset gate comes before the recurrent product.

    ::

        r = σ(W_xr x_t + W_hr h_{t-1} + b_r)
        z = σ(W_xz x_t + W_hz h_{t-1} + b_z)
        h̃ = tanh(W_xh x_t + W_hh (r ⊙ h_{t-1}) + b_h)
        h_t = (1−z) ⊙ h_{t-1} + z ⊙ h̃

    Each b is bias_ih + bias_hh. See ``gru_cell`` for what torch does otherwise.

    Source: Cho et al. (2014), arXiv:1406.1078; z's role as in Chung et al. (2014), arXiv:1412.3555.
    """
    (h_BH,) = state
    xr_BH, xz_BH, xn_BH = (x_BI @ weights.weight_ih.T + weights.bias_ih).chunk(3, dim=-1)
    weight_r_HH, weight_z_HH, weight_n_HH = weights.weight_hh.chunk(3)
    bias_r_H, bias_z_H, bias_n_H = weights.bias_hh.chunk(3)
    r_BH = torch.sigmoid(xr_BH + h_BH @ weight_r_HH.T + bias_r_H)
    z_BH = torch.sigmoid(xz_BH + h_BH @ weight_z_HH.T + bias_z_H)
    candidate_BH = torch.tanh(xn_BH + (r_BH * h_BH) @ weight_n_HH.T + bias_n_H)
    return ((1 - z_BH) * h_BH + z_BH * candidate_BH,)


def mingru_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the minimal GRU, whose gate and candidate see the input alone.

    ::

        z = σ(W_z x_t + b_z)                        h̃ = g(W_h x_t + b_h)
        h_t = (1−z) ⊙ h_{t-1} + z ⊙ h̃               g(x) = x + 0.5 where x ≥ 0, σ(x) elsewhere

    Given the inputs it is linear in h, so that all steps of a window can be computed at once.

    The paper has two forms: in its text h̃ is W_h x_t + b_h alone; this is the other, which it
    trains with, and whose g makes h̃ positive so that log h exists. scan.py takes no logarithm,
    and would not need it; but the models are better by it. Of three layers of 256 units,
    trained on 400,000 characters of the Bible, validation came to 2.279 bits per byte with g
    and 2.325 without at a learning rate of 0.008, 2.215 and 2.261 at 0.016 (one run each).

    Source: Feng et al. (2024), Were RNNs All We Needed?, arXiv:2410.01201, section 3.1, and for
    g the appendix on the log-space form.
    """
    (h_BH,) = state
    z_BH, candidate_BH = (x_BI @ weights.weight_ih.T + weights.bias_ih).chunk(2, dim=-1)
    z_BH = torch.sigmoid(z_BH)
    return ((1 - z_BH) * h_BH + z_BH * _positive(candidate_BH),)


def minlstm_cell(x_BI: Tensor, state: CellState, weights: CellWeights) -> CellState:
    """One step of the minimal LSTM: gates that sum to one, no output gate, and h its only state.

    ::

        f = σ(W_f x_t + b_f)                        i = σ(W_i x_t + b_i)
        f' = f / (f+i)                              i' = i / (f+i)
        h̃ = g(W_h x_t + b_h)                        h_t = f' ⊙ h_{t-1} + i' ⊙ h̃

    Of the paper's two forms this is again the one with g; see ``mingru_cell``.

    Source: Feng et al. (2024), arXiv:2410.01201, section 3.2.
    """
    (h_BH,) = state
    f_BH, i_BH, candidate_BH = (x_BI @ weights.weight_ih.T + weights.bias_ih).chunk(3, dim=-1)
    f_BH, i_BH = torch.sigmoid(f_BH), torch.sigmoid(i_BH)
    return (f_BH / (f_BH + i_BH) * h_BH + i_BH / (f_BH + i_BH) * _positive(candidate_BH),)


CELLS: dict[str, Cell] = {
    "rnn_tanh": rnn_tanh_cell,
    "rnn_relu": rnn_relu_cell,
    "lstm": lstm_cell,
    "gru": gru_cell,
    "gru_reset_before": gru_reset_before_cell,
    "mingru": mingru_cell,
    "minlstm": minlstm_cell,
}


def unroll(cell: Cell, x_BTI: Tensor, state: CellState, weights: CellWeights) -> tuple[Tensor, CellState]:
    """Run ``cell`` over a window.

    Returns:
        The h of every step (B, T, H), and the state after the last.
    """
    outputs = []
    for x_BI in x_BTI.unbind(dim=1):
        state = cell(x_BI, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


def _positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _affine(x_BI: Tensor, h_BH: Tensor, weights: CellWeights) -> Tensor:
    return x_BI @ weights.weight_ih.T + weights.bias_ih + h_BH @ weights.weight_hh.T + weights.bias_hh
