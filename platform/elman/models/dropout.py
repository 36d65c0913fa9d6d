"""Dropout on activations, words and weights: one draw per step, or one per window.

Every function scales what it keeps by 1 / (1 − p), so that nothing changes in evaluation.

Shape suffixes: B batch, T time steps, E embedding, H hidden, V rows of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elman.models.fused_dropout import dropout


class Dropout(nn.Module):
    """Dropout on (B, T, H).

    Per step, every unit of every step is drawn on its own. Variational, each row of the batch
    draws one mask over H and keeps it for the whole window.

    Source: Srivastava et al. (2014), JMLR 15; variational: Gal & Ghahramani (2016), arXiv:1512.05287.
    """

    def __init__(self, p: float, *, variational: bool = False) -> None:
        super().__init__()
        self.p = p
        self.variational = variational

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Drop in training; return the input itself in evaluation."""
        if not self.training or self.p == 0:
            return x_BTH
        if not self.variational:
            return dropout(x_BTH, self.p)
        return x_BTH * _scaled_mask((x_BTH.shape[0], 1, x_BTH.shape[2]), self.p, like=x_BTH)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"p={self.p}, variational={self.variational}"


class WordDropout(nn.Module):
    """Dropout of whole words: every unit of an embedded token goes, or none.

    Per step, each occurrence is drawn on its own. Variational, a word type is dropped
    wherever it occurs in the window, in every row of the batch: the mask belongs to the
    embedding matrix.

    Source: Gal & Ghahramani (2016), arXiv:1512.05287, section 4.2; one mask for the whole
    batch as in Merity et al. (2018), arXiv:1708.02182, section 4.3.
    """

    def __init__(self, p: float, *, variational: bool = False) -> None:
        super().__init__()
        self.p = p
        self.variational = variational

    def forward(self, tokens_BT: Tensor, num_words: int, like: Tensor) -> Tensor:
        """What every embedded token is multiplied by (B, T), in training: 0, or the scale of what is kept."""
        if self.variational:
            return _scaled_mask((num_words,), self.p, like=like)[tokens_BT]
        return _scaled_mask(tokens_BT.shape, self.p, like=like)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"p={self.p}, variational={self.variational}"


def drop_weight(weight: Tensor, p: float) -> Tensor:
    """Drop single weights of a recurrent matrix, one mask for the whole window.

    Source: Wan et al. (2013), Regularization of Neural Networks using DropConnect; on
    recurrent matrices: Merity et al. (2018), arXiv:1708.02182, section 2.
    """
    return dropout(weight, p)


def _scaled_mask(shape: tuple[int, ...] | torch.Size, p: float, *, like: Tensor) -> Tensor:
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)
