"""Output layers for large vocabularies: the exact softmax in chunks, and the adaptive one.

Shape suffixes: N tokens, H hidden, D narrowed hidden, V vocabulary, C tokens of one chunk, K clusters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.models.fused_loss import fused_loss, fused_scores, is_fused, pays
from elman.models.initialization import initialize_output

IGNORED = -100
"""Target that does not count, torch's own."""
LARGE_VOCABULARY = 4096
"""From here on the logits are computed in chunks: below, the whole is as fast, and small."""
CHUNK = 2048
"""Tokens of the vocabulary at a time: a few hundred rows of them stay in the cache."""
KEPT_LOGITS = 2**27
"""Logits up to which backward reads what forward computed; beyond, it computes them again."""


def linear_loss(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, divisor: Tensor | None = None
) -> Tensor:
    """Cross-entropy of ``F.linear(features, weight, bias)``, summed, in nats; never holds the whole logits.

    Products are in autocast's type where it is on; sums of exponentials in float32 at least.

    Args:
        features_NH: What is scored.
        weight_VH: A row for each token; any further ones are no tokens.
        bias_V: An addend for each token.
        targets_N: Token ids; ``IGNORED`` ones do not count.
        divisor: What the sum will be divided by, where it is not the number of targets: no other costs less.
    """
    dtype = _product_type(features_NH, weight_VH)
    if targets_N.numel() and is_fused(dtype, weight_VH):
        return fused_loss(features_NH, weight_VH, bias_V, targets_N, IGNORED, divisor)
    loss: Tensor = _LinearLoss.apply(features_NH, weight_VH, bias_V, targets_N, dtype)  # type: ignore[no-untyped-call]
    return loss


def kernel_pays(weight_VH: Tensor, num_targets: int) -> bool:
    """Whether the compiled kernel scores so many targets sooner than whole logits do, under the autocast of now."""
    return pays(weight_VH, num_targets) and is_fused(_product_type(weight_VH, weight_VH), weight_VH)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        features_NH = features_NH.detach().to(dtype)
        kept: list[Tensor] = []
        keeps = any(ctx.needs_input_grad) and targets_N.shape[0] * len(bias_V) <= KEPT_LOGITS
        wide = torch.promote_types(dtype, torch.float32)
        lse_N = features_NH.new_full(targets_N.shape, -torch.inf, dtype=wide)
        found_N = torch.zeros_like(lse_N)
        for begin in range(0, len(bias_V), CHUNK):
            logits_NC = _chunk(features_NH, weight_VH, bias_V, begin)
            kept += [logits_NC] if keeps else []
            logits_NC = logits_NC.to(wide)
            lse_N = torch.logaddexp(lse_N, logits_NC.logsumexp(1))
            rows, columns = _inside(targets_N, begin, logits_NC.shape[1])
            found_N[rows] = logits_NC[rows, columns]
        counts_N = (targets_N != IGNORED).to(wide)
        ctx.save_for_backward(features_NH, weight_VH, bias_V, targets_N, lse_N, counts_N)
        ctx.kept = kept
        return ((lse_N - found_N) * counts_N).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        features_NH, weight_VH, bias_V, targets_N, lse_N, counts_N = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, []
        dtype, wide = features_NH.dtype, lse_N.dtype
        wants_features, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # A row's factor goes to what its errors are multiplied with: fewer numbers than the errors.
        factors_N = counts_N * d_loss
        scaled_NH = (features_NH * factors_N[:, None]).to(dtype)
        d_features_NH = torch.zeros_like(features_NH, dtype=wide) if wants_features else None
        d_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        if d_weight_VH is not None:
            d_weight_VH[len(bias_V) :] = 0
        d_bias_V = torch.empty_like(bias_V) if wants_bias else None
        for index, begin in enumerate(range(0, len(bias_V), CHUNK)):
            end = min(begin + CHUNK, len(bias_V))
            logits_NC = kept[index] if kept else _chunk(features_NH, weight_VH, bias_V, begin)
            errors_NC = logits_NC.to(wide, copy=True).sub_(lse_N[:, None]).exp_()
            rows, columns = _inside(targets_N, begin, end - begin)
            errors_NC[rows, columns] -= 1
            if d_bias_V is not None:
                d_bias_V[begin:end] = factors_N @ errors_NC
            errors_NC = errors_NC.to(dtype)
            if d_weight_VH is not None:
                d_weight_VH[begin:end] = errors_NC.t() @ scaled_NH
            if d_features_NH is not None:
                d_features_NH += errors_NC @ weight_VH[begin:end].to(dtype)
        if d_features_NH is not None:
            d_features_NH *= factors_N[:, None]
        return d_features_NH, d_weight_VH, d_bias_V, None, None


@torch.no_grad()
def linear_scores(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss as of ``linear_loss``, and how many targets were the likeliest prediction; no gradients."""
    dtype = _product_type(features_NH, weight_VH)
    if targets_N.numel() and is_fused(dtype, weight_VH):
        return fused_scores(features_NH, weight_VH, bias_V, targets_N, IGNORED)
    features_NH = features_NH.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    lse_N = features_NH.new_full(targets_N.shape, -torch.inf, dtype=wide)
    best_N, found_N = lse_N.clone(), torch.zeros_like(lse_N)
    predicted_N = torch.zeros_like(targets_N)
    for begin in range(0, len(bias_V), CHUNK):
        logits_NC = _chunk(features_NH, weight_VH, bias_V, begin).to(wide)
        lse_N = torch.logaddexp(lse_N, logits_NC.logsumexp(1))
        rows, columns = _inside(targets_N, begin, logits_NC.shape[1])
        found_N[rows] = logits_NC[rows, columns]
        highest_N, place_N = logits_NC.max(1)
        better_N = highest_N > best_N
        best_N = torch.where(better_N, highest_N, best_N)
        predicted_N = torch.where(better_N, place_N + begin, predicted_N)
    counts_N = targets_N != IGNORED
    return ((lse_N - found_N) * counts_N).sum(), (predicted_N == targets_N).sum()


def _product_type(features_NH: Tensor, weight_VH: Tensor) -> torch.dtype:
    dtype, device = torch.promote_types(features_NH.dtype, weight_VH.dtype), features_NH.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _chunk(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, begin: int) -> Tensor:
    """Logits (N, C) of the tokens from ``begin`` on, in the features' type."""
    dtype = features_NH.dtype
    bias_C = bias_V[begin : begin + CHUNK]
    return F.linear(features_NH, weight_VH[begin : begin + len(bias_C)].to(dtype), bias_C.to(dtype))


def _inside(targets_N: Tensor, begin: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows whose target is among ``size`` tokens from ``begin`` on, and its place there."""
    rows = ((targets_N >= begin) & (targets_N < begin + size)).nonzero().flatten()
    return rows, targets_N[rows] - begin


def default_cutoffs(vocabulary_size: int) -> tuple[int, ...]:
    """The most frequent sixteenth first, then the rest of the first quarter, then the others.

    In running text of 33,000 words those are about 80, 13 and 7 % of the tokens.
    """
    return tuple(sorted({max(1, vocabulary_size // 16), max(1, vocabulary_size // 4)} - {vocabulary_size}))


class AdaptiveSoftmax(nn.Module):
    """Frequent tokens in a head of full width; each cluster of rarer ones behind a narrower projection.

    The head scores its tokens and the clusters; a token of a cluster has the cluster's
    probability times its own within it. Token ids must rise as frequency falls.

    Args:
        hidden_size: H of the features.
        vocabulary_size: V.
        cutoffs: First id of each cluster, rising; cluster k is H / 4ᵏ wide, counted from 1.

    Source: Grave et al. (2017), arXiv:1609.04309; our deviation: every token has a bias, as in
    the exact softmax, given from outside.
    """

    def __init__(self, hidden_size: int, vocabulary_size: int, cutoffs: tuple[int, ...]) -> None:
        super().__init__()
        assert cutoffs
        assert list(cutoffs) == sorted({*cutoffs})
        assert 0 < cutoffs[0] <= cutoffs[-1] < vocabulary_size
        self.vocabulary_size, self.cutoffs = vocabulary_size, cutoffs
        self.edges = list(pairwise((*cutoffs, vocabulary_size)))
        self.head = nn.Parameter(torch.empty(cutoffs[0] + len(cutoffs), hidden_size))
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        self.narrow = nn.ParameterList()
        self.tails = nn.ParameterList()
        for k, (begin, end) in enumerate(self.edges, start=1):
            width = max(1, hidden_size // 4**k)
            self.narrow.append(torch.empty(width, hidden_size))
            self.tails.append(torch.empty(end - begin, width))
        for weight in (self.head, *self.narrow, *self.tails):
            initialize_output(weight)

    def loss(self, features_NH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
        """Cross-entropy summed over the targets, nats; a cluster is scored only where its tokens are due."""
        heads_N, divisor = targets_N.clone(), (targets_N != IGNORED).sum()
        loss = torch.zeros((), device=features_NH.device)
        for k, (begin, end) in enumerate(self.edges):
            rows, within = _inside(targets_N, begin, end - begin)
            heads_N[rows] = self.cutoffs[0] + k
            narrowed_ND = F.linear(features_NH[rows], self.narrow[k])
            loss = loss + linear_loss(narrowed_ND, self.tails[k], bias_V[begin:end], within, divisor)
        return loss + linear_loss(features_NH, self.head, self._head_bias(bias_V), heads_N, divisor)

    def log_probabilities(self, features_H: Tensor, bias_V: Tensor) -> Tensor:
        """Of every token (…, V), in float32 at least; their exponentials sum to one."""
        first = self.cutoffs[0]
        head = _log_softmax(F.linear(features_H, self.head, self._head_bias(bias_V)))
        parts = [head[..., :first]]
        for k, (begin, end) in enumerate(self.edges):
            tail = F.linear(F.linear(features_H, self.narrow[k]), self.tails[k], bias_V[begin:end])
            parts.append(head[..., first + k, None] + _log_softmax(tail))
        return torch.cat(parts, -1)

    @torch.no_grad()
    def scores(self, features_NH: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and how many targets were the likeliest prediction.

        A cluster is looked into only where it is likelier than the best token so far: its tokens cannot be else.
        """
        first = self.cutoffs[0]
        head = _log_softmax(F.linear(features_NH, self.head, self._head_bias(bias_V)))
        best_N, predicted_N = head[:, :first].max(1)
        for k, (begin, end) in enumerate(self.edges):
            rows = (head[:, first + k] > best_N).nonzero().flatten()
            narrowed_ND = F.linear(features_NH[rows], self.narrow[k])
            tail = _log_softmax(F.linear(narrowed_ND, self.tails[k], bias_V[begin:end])) + head[rows, first + k, None]
            highest, place = tail.max(1)
            better = highest > best_N[rows]
            best_N[rows[better]], predicted_N[rows[better]] = highest[better], place[better] + begin
        return self.loss(features_NH, bias_V, targets_N), (predicted_N == targets_N).sum()

    def _head_bias(self, bias_V: Tensor) -> Tensor:
        return torch.cat((bias_V[: self.cutoffs[0]], self.cluster_bias))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
