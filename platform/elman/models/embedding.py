"""Looking embedded tokens up.

Shape suffixes: V rows, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elman.models.memory import pooled

LARGE_BYTES = 2**25
"""From this size on no setting of the C library keeps a gradient's memory from one step to the next."""


class Embedding(nn.Embedding):
    """torch's; on CPU, the gradient of a large one comes in memory that serves again.

    A window changes hundreds of its tens of thousands of rows, and an optimizer with a memory for
    each weight wants the others' zeros too: their new pages, at every step, take longer than Adam.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the tokens (…, E)."""
        large = self.weight.numel() * self.weight.itemsize >= LARGE_BYTES
        if large and not self.sparse and self.weight.device.type == "cpu" and torch.is_grad_enabled():
            return _Lookup.apply(self.weight, input)  # type: ignore[no-untyped-call, no-any-return]  # torch's
        return super().forward(input)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VE: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = weight_VE.shape
        return nn.functional.embedding(index, weight_VE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        d_weight_VE = pooled(ctx.shape, d_out.dtype).zero_()
        return d_weight_VE.index_add_(0, index.flatten(), d_out.reshape(-1, d_out.shape[-1])), None
