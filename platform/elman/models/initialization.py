"""Initial weights, each choice with its source.

Shape suffixes: E embedding, H hidden, G gates × hidden, V vocabulary.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from elman.config.schema import MINIMAL_CELLS


@torch.no_grad()
def initialize_embedding(weight_VE: Tensor, *, std: float, start_id: int, vocabulary_size: int) -> None:
    """Draw from a normal distribution, and start from zeros the row that is input only.

    A layer learns fastest from inputs of unit variance (Le Cun et al. 1998, Efficient BackProp,
    section 4.3), which is torch.nn.Embedding's own choice too; see ``embedding_std``.
    """
    if weight_VE.is_meta:
        return  # there, normal_ has no effect but to import torch._dynamo, for seconds
    nn.init.normal_(weight_VE, std=std)
    if start_id >= vocabulary_size:
        nn.init.zeros_(weight_VE[start_id])


def embedding_std(embedding_size: int, *, is_output: bool, unit_features: bool) -> float:
    """Standard deviation of the embedding.

    1, unless the same matrix scores the features directly. Then logits should begin small too,
    which asks for 1 / √E where the features begin near one, normalised as the transformer's or
    positive as the minimal cells'; where they do not (an LSTM's begin near 0.1), √ of that is the
    middle between the two demands. On characters, an LSTM of 128 units so tied is after 200 steps
    0.4 nats ahead of one that starts from ±0.1 as in Merity et al. (2018), arXiv:1708.02182.
    """
    if not is_output:
        return 1.0
    small = 1 / sqrt(embedding_size)
    return small if unit_features else sqrt(small)


@torch.no_grad()
def initialize_recurrent(layer: nn.Module, *, kind: str, forget_bias: float) -> None:
    """Initialise one recurrent layer with torch's weight names.

    - hidden to hidden: each gate's square block orthogonal, so that the state neither fades
      nor grows at first (Saxe et al. 2014, arXiv:1312.6120); for the relu rnn the identity
      (Le et al. 2015, arXiv:1504.00941).
    - input to hidden: each gate's block uniform after Glorot & Bengio (2010).
    - biases: zero, but for the forget gate of LSTM and minLSTM, whose two sum to ``forget_bias``:
      open at first (Gers et al. 2000; Jozefowicz et al. 2015, section 2.2). The candidates of
      the minimal cells are drawn from ± 0.5: with nothing in, as at the start of a text, all
      units would be g(0), and a layer norm after them would blow up what they differ by.
    """
    weights: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
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
    elif kind in MINIMAL_CELLS:
        nn.init.uniform_(weights["bias_ih_l0"][-hidden_size:], -0.5, 0.5)
        if kind == "minlstm":
            weights["bias_ih_l0"][:hidden_size] = forget_bias


@torch.no_grad()
def initialize_linear(layer: nn.Linear, *, gain: float = 1.0) -> None:
    """Glorot & Bengio (2010) uniform weights, times ``gain``, and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialize_output(weight_VH: Tensor) -> None:
    """Uniform from ±1 / √H, as torch.nn.Linear: logits begin with a spread below one.

    Source: Le Cun et al. (1998), Efficient BackProp, section 4.6, for its scale.
    """
    bound = 1 / sqrt(weight_VH.shape[1])
    nn.init.uniform_(weight_VH, -bound, bound)
