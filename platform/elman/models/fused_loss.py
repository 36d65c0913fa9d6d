"""The loss of a linear layer in bfloat16, by the compiled kernels of linear_loss.cpp.

One serves large vocabularies, whose weights pass through the cache once forward and once backward; the other
small ones, whose weights stay there: it goes over the text once. Both compute the gradients of a mean with the
loss, so that nothing but these is kept until backward.

Shape suffixes: N positions of the text, P of them padded for the kernel, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elman.models.compiled import has_tiles, load_bf16_library
from elman.models.memory import pooled

SOURCE = Path(__file__).with_name("linear_loss.cpp")
LANES = 16
ROWS = 96
"""Of the vocabulary, in a block: as in linear_loss.cpp, which writes a row of ``tops`` for each."""
LEAST_LARGE = 2048
"""Tokens from which on a vocabulary is large: there both kernels are as fast."""
FEWEST_TARGETS = 128
"""From which on the kernel for small vocabularies pays."""
FEWEST_LOGITS = 2**19
"""From which on the kernel for large ones does."""
KEPT_LOGITS = 2**26
"""Most whose exponentials are kept for the gradients, in two bytes each; unless that were too few positions."""
FEWEST_POSITIONS = 512
"""At a time: all weights are read for them."""

NUMBERS = ("threads", "positions", "hidden", "vocabulary", "stride", "tiles")
"""With which the structs of both kernels begin."""


class _Loss(ctypes.Structure):
    """struct Loss of linear_loss.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*NUMBERS, "adds")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("weight", "bias", "features", "targets", "packed", "kept", "tops", "sums", "predicted"),
                *("lse", "found", "factors", "d_weight", "d_bias", "d_features", "gathered"),
            )
        ),
    )


class _SmallLoss(ctypes.Structure):
    """struct SmallLoss of linear_loss.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in NUMBERS),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("weight", "bias", "features", "targets", "predicted", "losses", "left"),
                *("factor", "right", "sums", "d_weight", "d_bias", "d_features"),
            )
        ),
    )


def is_fused(dtype: torch.dtype, weight_VH: Tensor) -> bool:
    """Whether the kernel computes products of this type with these weights."""
    on_cpu = weight_VH.device.type == "cpu" and dtype == torch.bfloat16 and weight_VH.dtype == torch.float32
    return on_cpu and _kernels() is not None


def fused_loss(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    ignored: int,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``F.linear(features, weight, bias)``, summed, in nats.

    Where its graph is retained, the gradients that it gives are not to be changed in place.

    Args:
        features_NH: In bfloat16.
        weight_VH: In float32; rows beyond the biases are no tokens.
        bias_V: An addend for each token.
        targets_N: Token ids.
        ignored: The target that does not count.
        divisor: What the loss will be divided by, where that is not the number of targets: gradients of
            that quotient are computed with it, and those of any other follow by another pass over them.

    Raises:
        IndexError: A target is no token.
    """
    counts_N = _counted(targets_N, ignored, len(bias_V))
    if not torch.is_grad_enabled():  # else the kernels would compute gradients, or keep what they need for them
        features_NH, weight_VH, bias_V = features_NH.detach(), weight_VH.detach(), bias_V.detach()
    loss: Tensor = _FusedLoss.apply(features_NH, weight_VH, bias_V, targets_N, counts_N, divisor)  # type: ignore[no-untyped-call]
    return loss


def fused_scores(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, ignored: int
) -> tuple[Tensor, Tensor]:
    """Loss as of ``fused_loss``, and how many targets were the likeliest prediction; no gradients."""
    counts_N = _counted(targets_N, ignored, len(bias_V))
    predicted_N = torch.empty_like(targets_N, dtype=torch.int64, memory_format=torch.contiguous_format)
    compute = _kernel_for(weight_VH, bias_V, targets_N)
    loss, _ = compute(features_NH, weight_VH, bias_V, targets_N, counts_N, predicted_N=predicted_N)
    return loss, (predicted_N == targets_N).sum()


def is_small(weight_VH: Tensor, num_targets: int) -> bool:
    """Whether the kernel for small vocabularies serves these weights, and so many targets.

    With fewer of them for a thread than there are hidden units, the threads' sums would cost more than it saves.
    """
    vocabulary_size, hidden_size = weight_VH.shape
    enough = num_targets >= max(FEWEST_TARGETS, torch.get_num_threads() * hidden_size)
    return vocabulary_size < LEAST_LARGE and enough


def pays(weight_VH: Tensor, num_targets: int) -> bool:
    """Whether a kernel, where there is one, scores so many targets sooner than whole logits do."""
    vocabulary_size = weight_VH.shape[0]
    large_enough = vocabulary_size >= LEAST_LARGE and num_targets * vocabulary_size >= FEWEST_LOGITS
    return large_enough or is_small(weight_VH, num_targets)


def _counted(targets_N: Tensor, ignored: int, num_tokens: int) -> Tensor:
    """Which targets count."""
    counts_N = targets_N != ignored
    smallest, largest = torch.aminmax(torch.where(counts_N, targets_N, 0))
    if smallest < 0 or largest >= num_tokens:  # the kernel would write what is not there
        raise IndexError(f"target out of range: {smallest} to {largest} of {num_tokens} tokens")
    return counts_N


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        counts_N: Tensor,
        divisor: Tensor | None,
    ) -> Tensor:
        ctx.factor = None
        if any(ctx.needs_input_grad):
            ctx.factor = (counts_N.sum() if divisor is None else divisor).float().reciprocal()
        compute = _kernel_for(weight_VH, bias_V, targets_N)
        loss, gradients = compute(features_NH, weight_VH, bias_V, targets_N, counts_N, factor=ctx.factor)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if d_loss != ctx.factor:  # another scale was wanted
            scale = d_loss / ctx.factor
            gradients = [torch.mul(one, scale, out=pooled(one.shape, one.dtype)) for one in gradients]
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(gradient if wants else None for gradient, wants in wanted), None, None, None


def _kernel_for(weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    return _small if is_small(weight_VH[: len(bias_V)], len(targets_N)) else _large


def _small(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    counts_N: Tensor,
    *,
    factor: Tensor | None = None,
    predicted_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and with a factor its product with the gradients: of features, weights and biases."""
    vocabulary_size, hidden_size = len(bias_V), weight_VH.shape[1]
    threads, padded = torch.get_num_threads(), _padded(hidden_size, 2 * LANES)
    losses_N = torch.empty(targets_N.shape[0])
    call: dict[str, Tensor | None] = {
        **_layer(weight_VH, bias_V),
        "features": _rows(features_NH),
        "targets": torch.where(counts_N, targets_N, -1).long(),
        "predicted": predicted_N,
        "losses": losses_N,
        "left": torch.empty(vocabulary_size, padded, dtype=torch.bfloat16),
    }
    gradients = []
    if factor is not None:
        gradients = _gradients(features_NH, weight_VH, bias_V)
        call |= dict(zip(("d_features", "d_weight", "d_bias"), gradients, strict=True))
        call["factor"] = factor
        call["right"] = torch.empty(_padded(vocabulary_size, 2), padded, dtype=torch.bfloat16)
        call["sums"] = torch.empty(threads, vocabulary_size, padded + LANES)
    loss = _SmallLoss(**_arguments(call))
    library = _kernels()
    assert library is not None
    library.elman_small_loss(ctypes.byref(loss))
    return losses_N.sum(), gradients


def _large(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    counts_N: Tensor,
    *,
    factor: Tensor | None = None,
    predicted_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The same, by as many positions at a time as ``KEPT_LOGITS`` allows where gradients are wanted."""
    features_NH, targets_N = _rows(features_NH), targets_N.long().contiguous()
    (num_positions, hidden_size), vocabulary_size = features_NH.shape, len(bias_V)
    size, threads = num_positions, torch.get_num_threads()
    call: dict[str, Tensor | None] = {**_layer(weight_VH, bias_V), "predicted": predicted_N}
    gradients = []
    if factor is not None:
        gradients = _gradients(features_NH, weight_VH, bias_V)
        num_parts = -(-num_positions // max(FEWEST_POSITIONS, KEPT_LOGITS // vocabulary_size))
        size = _padded(-(-num_positions // num_parts), LANES)
        call["kept"] = pooled((_padded(vocabulary_size, 2 * LANES), size), torch.bfloat16)
    loss = torch.zeros(())
    for begin in range(0, num_positions, size):
        part = slice(begin, begin + size)
        counts_n = counts_N[part]
        count = len(counts_n)
        padded = _padded(count, LANES)
        lse_P, found_P = torch.zeros(padded), torch.zeros(padded)
        call |= {
            "features": features_NH[part],
            "targets": targets_N[part],
            "tops": torch.empty(-(-vocabulary_size // ROWS), padded),
            "sums": torch.empty(threads, 3, padded),
            "lse": lse_P,
            "found": found_P,
        }
        _call(call, is_forward=True)
        loss += ((lse_P - found_P)[:count] * counts_n).sum()
        if factor is not None:
            factors_P = torch.zeros(padded)
            factors_P[:count] = torch.where(counts_n, factor, 0)
            d_features_NH, d_weight_VH, d_bias_V = gradients
            call |= {
                "factors": factors_P,
                "d_weight": d_weight_VH,
                "d_bias": d_bias_V,
                "d_features": d_features_NH[part],
                "gathered": torch.empty(threads, padded, _padded(hidden_size, 2 * LANES)),
            }
            _call(call, is_forward=False, adds=begin > 0)
    return loss, gradients


def _layer(weight_VH: Tensor, bias_V: Tensor) -> dict[str, Tensor]:
    """Weights and biases as the kernels read them."""
    return {"weight": weight_VH.detach().contiguous(), "bias": bias_V.detach().float().contiguous()}


def _gradients(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> list[Tensor]:
    """Memory for the gradients, as the kernels write them."""
    types = (torch.bfloat16, torch.float32, torch.float32)
    gradients = [pooled(of.shape, dtype) for of, dtype in zip((features_NH, weight_VH, bias_V), types, strict=True)]
    gradients[1][len(bias_V) :] = 0  # which the kernels do not write
    return gradients


def _rows(features_NH: Tensor) -> Tensor:
    """The features as the kernels read them: bfloat16, each row in one piece."""
    features_NH = features_NH.detach().to(torch.bfloat16)
    return features_NH if features_NH.stride(1) == 1 else features_NH.contiguous()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _call(tensors: dict[str, Tensor | None], *, is_forward: bool, adds: bool = False) -> None:
    features, library = tensors["features"], _kernels()
    assert features is not None
    assert library is not None
    num_positions, hidden_size = features.shape
    packed = torch.empty(_padded(num_positions, LANES), _padded(hidden_size, 2 * LANES), dtype=torch.bfloat16)
    loss = _Loss(**_arguments({**tensors, "packed": packed}), adds=adds)
    library.elman_linear_loss(ctypes.byref(loss), int(is_forward))


def _arguments(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    """``NUMBERS``, and where the tensors lie."""
    bias, features = tensors["bias"], tensors["features"]
    assert bias is not None
    assert features is not None
    numbers = (torch.get_num_threads(), *features.shape, bias.shape[0], features.stride(0), int(_has_tiles()))
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    return dict(zip(NUMBERS, numbers, strict=True)) | addresses


def _kernels() -> ctypes.CDLL | None:
    return load_bf16_library(SOURCE)


def _has_tiles() -> bool:
    return has_tiles(_kernels())
