"""Linear recurrences over a window, all steps at once: what the minimal cells need no loop for.

Shape suffixes: B batch, T time steps, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_recurrence(keep_BTH: Tensor, add_BTH: Tensor, h_BH: Tensor) -> Tensor:
    """h_t = keep_t ⊙ h_{t-1} + add_t, for every step of a window.

    Neighbouring steps are composed in pairs, the half as long recurrence of the pairs is solved
    the same way, and the steps between follow from it: about 2 T multiplications and additions
    in 2 log T operations one after another. What is multiplied up are factors from 0 to 1 alone,
    which can vanish and never overflow; there are no logarithms, no quotients, and signs are free.

    Args:
        keep_BTH: Share of the state that is kept, from 0 to 1.
        add_BTH: What is added.
        h_BH: The state before the first step.

    Returns:
        The state after every step (B, T, H).

    Source: Blelloch (1990), Prefix Sums and Their Applications, section 1.4.1, for the recurrence
    as a scan; the gradient of a recurrence is one too, from the end to the beginning.
    """
    return _Recurrence.apply(keep_BTH, add_BTH, h_BH)  # type: ignore[no-untyped-call, no-any-return]  # torch's


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep_BTH: Tensor, add_BTH: Tensor, h_BH: Tensor) -> Tensor:
        start_BH = torch.addcmul(add_BTH[:, 0], keep_BTH[:, 0], h_BH)
        out_BTH = _scan(keep_BTH, torch.cat((start_BH.unsqueeze(1), add_BTH[:, 1:]), dim=1))
        ctx.save_for_backward(keep_BTH, h_BH, out_BTH)
        return out_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d_add_t = d_out_t + keep_{t+1} ⊙ d_add_{t+1}; the others are products with it."""
        keep_BTH, h_BH, out_BTH = ctx.saved_tensors
        back_BTH = torch.cat((torch.zeros_like(keep_BTH[:, :1]), keep_BTH[:, 1:].flip(1)), dim=1)
        d_add_BTH = _scan(back_BTH, d_out_BTH.flip(1)).flip(1)
        before_BTH = torch.cat((h_BH.unsqueeze(1), out_BTH[:, :-1]), dim=1)
        return d_add_BTH * before_BTH, d_add_BTH, d_add_BTH[:, 0] * keep_BTH[:, 0]


def _scan(keep_BTH: Tensor, add_BTH: Tensor) -> Tensor:
    """The recurrence from a state of zeros."""
    length = add_BTH.shape[1]
    if length == 1:
        return add_BTH
    pairs = length - length % 2
    second_BTH = keep_BTH[:, 1:pairs:2]
    after_BTH = _scan(
        keep_BTH[:, 0:pairs:2] * second_BTH,
        torch.addcmul(add_BTH[:, 1:pairs:2], second_BTH, add_BTH[:, 0:pairs:2]),
    )
    out_BTH = torch.empty_like(add_BTH)
    out_BTH[:, 0] = add_BTH[:, 0]
    out_BTH[:, 1::2] = after_BTH
    between_BTH = after_BTH[:, : (length - 1) // 2]
    out_BTH[:, 2::2] = torch.addcmul(add_BTH[:, 2::2], keep_BTH[:, 2::2], between_BTH)
    return out_BTH
