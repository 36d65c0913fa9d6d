"""Layer normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """torch's, in single precision at least.

    In bfloat16 on CPU it sums the gradients of its weights in bfloat16 too, where ones add up to 256 at most.

    Source: Ba et al. (2016), arXiv:1607.06450.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension; the type stays."""
        if input.dim() == 3 and not input.is_contiguous() and input.transpose(0, 1).is_contiguous():
            # Time-major, as the compiled kernels leave and take it: torch's would copy, and turn it.
            return self.forward(input.transpose(0, 1)).transpose(0, 1)
        wide = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(wide)).to(input.dtype)
