"""A small causal Transformer behind the recurrent interface: the yardstick for long-range dependence.

Its carry is a cache of the last ``context_length`` keys and values of every block. Each
position attends to itself and at most that many before it, whether they lie in its window or
in the cache, so that where the stream is cut makes no difference.

Shape suffixes: B batch, T time steps of the window, S time steps of the cache, K = S + T,
N heads, D width of a head, H hidden.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.config.schema import ModelConfig
from elman.models.dropout import Dropout
from elman.models.initialization import initialize_linear
from elman.models.normalization import LayerNorm
from elman.models.state import State, expand

ROTARY_BASE = 10_000.0


class TransformerStack(nn.Module):
    """Pre-norm blocks with rotary positions and a last normalisation.

    Args:
        context_length: Tokens before its own that a position attends to.
        cached: Whether the carry holds them; without, every window starts afresh.

    Source: Vaswani et al. (2017), arXiv:1706.03762; normalisation before each branch: Xiong et
    al. (2020), arXiv:2002.04745; rotary positions: Su et al. (2021), arXiv:2104.09864; the
    cache: Dai et al. (2019), arXiv:1901.02860.
    """

    def __init__(self, config: ModelConfig, *, context_length: int, cached: bool = True) -> None:
        super().__init__()
        self.output_size = config.hidden_size
        self.context_length = context_length
        self.cache_length = context_length if cached else 0
        self.num_heads = config.num_heads
        self.head_size = config.hidden_size // config.num_heads
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size)

    def initial_state(self, batch_size: int) -> State:
        """An empty cache: per block the keys and values (B, N, S, D), at last which of them are valid (B, S)."""
        weight = self.norm.weight
        cache = weight.new_zeros(1, self.num_heads, self.cache_length, self.head_size)
        valid = torch.zeros(1, self.cache_length, dtype=torch.bool, device=weight.device)
        return expand((*((cache, cache) for _ in self.layers), (valid,)), batch_size)

    def forward(
        self, x_BTH: Tensor, state: State, resets_BT: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run a window through all blocks; returns the normalised output (B, T, H), and the carry.

        From a position on where ``resets_BT`` is True, nothing before it is attended to.
        """
        length = x_BTH.shape[1]
        *caches, (valid_BS,) = state
        valid_BK = torch.cat((valid_BS, valid_BS.new_ones(x_BTH.shape[0], length)), dim=1)
        mask_BNTK = self._visible(length, valid_BK)
        if resets_BT is not None:
            counts_BT = resets_BT.long().cumsum(1)  # positions of one text have seen equally many
            counts_BK = torch.cat((torch.zeros_like(valid_BS, dtype=torch.int64), counts_BT), dim=1)
            mask_BNTK = mask_BNTK & (counts_BT[:, None, :, None] == counts_BK[:, None, None])
            valid_BK = valid_BK & (counts_BK == counts_BT[:, -1:])
        rotation = _rotation(valid_BK.shape[1], self.head_size, like=x_BTH)
        after: list[tuple[Tensor, ...]] = []
        for block, cache in zip(self.layers, caches, strict=True):
            x_BTH, keys_values = cast(TransformerBlock, block)(x_BTH, cache, mask_BNTK, rotation)
            after.append(tuple(part[:, :, length:] for part in keys_values))
        return self.norm(x_BTH), (*after, (valid_BK[:, length:],))

    def _visible(self, length: int, valid_BK: Tensor) -> Tensor:
        """What each position may attend to: a band (B, 1, T, K) that ends at the position itself."""
        if length == 1:
            return valid_BK[:, None, None]  # the band is the whole cache
        band_TK = valid_BK.new_ones(length, valid_BK.shape[1])
        own = self.cache_length  # column of the window's first position
        band_TK = band_TK.tril(own).triu(own - self.context_length)
        return band_TK & valid_BK[:, None, None]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is 4 × H wide, with GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm = LayerNorm(size)
        self.queries_keys_values = nn.Linear(size, 3 * size)
        self.attended = nn.Linear(size, size)
        self.mlp_norm = LayerNorm(size)
        self.widen = nn.Linear(size, 4 * size)
        self.narrow = nn.Linear(4 * size, size)
        self.dropout = Dropout(config.dropout_at("layer"), variational="layer" in config.variational)
        for layer in (self.queries_keys_values, self.widen):
            initialize_linear(layer)
        for layer in (self.attended, self.narrow):
            # What writes to the residual stream is scaled, so that its variance does not grow with
            # depth: Radford et al. (2019), Language Models are Unsupervised Multitask Learners, 2.3.
            initialize_linear(layer, gain=(2 * config.num_layers) ** -0.5)

    def forward(
        self, x_BTH: Tensor, cache: tuple[Tensor, ...], mask_BNTK: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the stream (B, T, H), and all keys and values (B, N, K, D), which are not rotated."""
        mixed_BTH, keys_values = self._attend(self.attention_norm(x_BTH), cache, mask_BNTK, rotation)
        x_BTH = x_BTH + self.dropout(mixed_BTH)
        mlp_BTH = self.narrow(F.gelu(self.widen(self.mlp_norm(x_BTH))))
        return x_BTH + self.dropout(mlp_BTH), keys_values

    def _attend(
        self, x_BTH: Tensor, cache: tuple[Tensor, ...], mask_BNTK: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        length = x_BTH.shape[1]
        split_BT3ND = self.queries_keys_values(x_BTH).unflatten(-1, (3, self.num_heads, -1))
        queries_BNTD, keys_BNTD, values_BNTD = split_BT3ND.permute(2, 0, 3, 1, 4)
        kind = keys_BNTD.dtype  # under autocast the fresh cache is wider than what joins it
        keys_BNKD = torch.cat((cache[0].to(kind), keys_BNTD), dim=2)
        values_BNKD = torch.cat((cache[1].to(kind), values_BNTD), dim=2)
        cos_KD, sin_KD = rotation
        # Attention sees only distances, so positions may count from the start of the cache.
        mixed_BNTD = F.scaled_dot_product_attention(
            _rotate(queries_BNTD, cos_KD[-length:], sin_KD[-length:]),
            _rotate(keys_BNKD, cos_KD, sin_KD),
            values_BNKD,
            attn_mask=mask_BNTK,
        )
        return self.attended(mixed_BNTD.transpose(1, 2).flatten(2)), (keys_BNKD, values_BNKD)


def _rotation(length: int, head_size: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (K, D) of the angle by which each position turns each pair of units."""
    pairs = torch.arange(0, head_size, 2, device=like.device, dtype=like.dtype) / head_size
    positions = torch.arange(length, device=like.device, dtype=like.dtype)
    angles = torch.outer(positions, ROTARY_BASE**-pairs).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn the pairs (d, d + D/2) of every head by their position's angle."""
    first, second = x_BNTD.chunk(2, dim=-1)
    return (x_BNTD * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD).to(x_BNTD.dtype)
