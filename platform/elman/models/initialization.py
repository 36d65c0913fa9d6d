"""Initial weights, each choice with its source.

Shape suffixes: E embedding, H hidden, G gates × hidden, V vocabulary.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

EMBEDDING_RANGE = 0.1


@torch.no_grad()
def initialize_embedding(weight_VE: Tensor, *, start_id: int, vocabulary_size: int) -> None:
    """Draw uniformly from ±0.1, and start from zeros the row that is input only.

    Small, because a tied embedding is the output layer too, whose first logits should be near zero.

    Source: Merity et al. (2018), arXiv:1708.02182, section 5.
    """
    nn.init.uniform_(weight_VE, -EMBEDDING_RANGE, EMBEDDING_RANGE)
    if start_id >= vocabulary_size:
        nn.init.zeros_(weight_VE[start_id])


@torch.no_grad()
def initialize_recurrent(layer: nn.Module, *, kind: str, forget_bias: float) -> None:
    """Initialise one recurrent layer with torch's weight names.

    - hidden to hidden: each gate's square block orthogonal, so that the state neither fades
      nor grows at first (Saxe et al. 2014, arXiv:1312.6120); for the relu rnn the identity
      (Le et al. 2015, arXiv:1504.00941).
    - input to hidden: each gate's block uniform after Glorot & Bengio (2010).
    - biases: zero, but for the LSTM's forget gate, whose two sum to ``forget_bias``: open at
      first (Gers et al. 2000; Jozefowicz et al. 2015, section 2.2).
    """
    weights: dict[str, Tensor] = dict(layer.named_parameters())
    weight_hh_GH = weights["weight_hh_l0"]
    hidden_size = weight_hh_GH.shape[1]
    for block_HH in torch.split(weight_hh_GH, hidden_size):
        if kind == "rnn_relu":
            block_HH.zero_().fill_diagonal_(1.0)
        else:
            nn.init.orthogonal_(block_HH)
    for block in torch.split(weights["weight_ih_l0"], hidden_size):
        nn.init.xavier_uniform_(block)
    nn.init.zeros_(weights["bias_ih_l0"])
    nn.init.zeros_(weights["bias_hh_l0"])
    if kind == "lstm":
        weights["bias_ih_l0"][hidden_size : 2 * hidden_size] = forget_bias


@torch.no_grad()
def initialize_linear(layer: nn.Linear, *, depth: int | None = None) -> None:
    """Glorot & Bengio (2010) uniform weights and zero biases.

    ``depth``, the number of Transformer blocks, marks a layer that writes to the residual
    stream: it is scaled by 1 / √(2 · depth), so that the stream keeps its variance at any depth
    (Radford et al. 2019, section 2.3).
    """
    nn.init.xavier_uniform_(layer.weight, gain=1.0 if depth is None else 1 / sqrt(2 * depth))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialize_output(weight_VH: Tensor) -> None:
    """Uniform from ±1 / √H, as torch.nn.Linear: logits begin with a spread below one.

    Source: Le Cun et al. (1998), Efficient BackProp, section 4.6, for its scale.
    """
    bound = 1 / sqrt(weight_VH.shape[1])
    nn.init.uniform_(weight_VH, -bound, bound)
