"""Minimal gated recurrences over a window, without a loop over its steps.

Given the gates they are linear in their state, h_t = keep_t ⊙ h_{t-1} + add_t. In torch all
steps of such a recurrence are computed at once, anywhere and in any precision; on the CPU, in
single precision or bfloat16, the compiled kernel of scan.cpp does it in order of time, which
reads everything once, and finds its parallel work in the units.

Shape suffixes: B batch, T time steps, I input, H hidden, G gates × hidden, V rows of a table.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elman.models.compiled import load_library
from elman.models.fused import Resets, Rows

SOURCE = Path(__file__).with_name("scan.cpp")
GATES = {"mingru": 2, "minlstm": 3}


# In torch -------------------------------------------------------------------------------


def minimal_gates(kind: str, gates_BTG: Tensor) -> tuple[Tensor, Tensor]:
    """What a minimal cell keeps of its state, and what it adds, each (…, H), in single precision at least.

    1 − σ(x) is σ(−x), and f / (f+i) is σ(log f − log i): neither cancels, nor divides 0 by 0.
    """
    gates_BTG = gates_BTG.to(torch.promote_types(gates_BTG.dtype, torch.float32))
    if kind == "mingru":
        z_BTH, candidate_BTH = gates_BTG.chunk(2, dim=-1)
    else:
        f_BTH, i_BTH, candidate_BTH = gates_BTG.chunk(3, dim=-1)
        z_BTH = F.logsigmoid(i_BTH) - F.logsigmoid(f_BTH)
    positive_BTH = torch.where(candidate_BTH >= 0, candidate_BTH + 0.5, torch.sigmoid(candidate_BTH))
    return torch.sigmoid(-z_BTH), torch.sigmoid(z_BTH) * positive_BTH


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


# Compiled -------------------------------------------------------------------------------


class _Window(ctypes.Structure):
    """struct Window of scan.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "batch", "steps", "hidden", "is_bf16")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("tokens", "resets", "start", "gates", "bias", "h", "before", "outputs"),
                *("d_outputs", "d_gates", "d_bias", "d_start"),
            )
        ),
    )


def is_scanned(kind: str, like: Tensor) -> bool:
    """Whether the kernel computes this kind of cell with weights such as these."""
    return kind in GATES and like.device.type == "cpu" and like.dtype == torch.float32 and _kernels() is not None


def scanned_window(
    kind: str, x: Tensor | Rows, state: tuple[Tensor, ...], weights: list[Tensor], resets: Resets | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer over a window.

    Args:
        kind: One of ``GATES``.
        x: Input (B, T, I), or rows to choose from, which are then multiplied once each.
        state: The h before (B, H).
        weights: As in kernels.py.
        resets: Where the state starts anew within the window.

    Returns:
        The h of every step (B, T, H), in bfloat16 where autocast says so, and the last one in float32.

    Raises:
        IndexError: If there is no row of an index.
    """
    weight_ih, _, bias_ih, _ = weights
    tokens_BT: Tensor | None = None
    if isinstance(x, Rows):
        tokens_BT = x.index_BT.contiguous()
        smallest, largest = torch.aminmax(tokens_BT)
        if smallest < 0 or largest >= x.rows_VI.shape[0]:  # the kernel would read what is not there
            raise IndexError(f"index out of range: {smallest} to {largest} of {x.rows_VI.shape[0]} rows")
    gates = F.linear(x.rows_VI if isinstance(x, Rows) else x, weight_ih)
    if gates.dtype != torch.bfloat16:
        gates = gates.float()
    where_BT, (start_1H,) = (None, (None,)) if resets is None else (resets.where_BT.contiguous(), resets.start)
    out_BTH, last_BH = _ScannedWindow.apply(kind, gates, tokens_BT, bias_ih, state[0], where_BT, start_1H)  # type: ignore[no-untyped-call]
    return out_BTH, (last_BH,)


class _ScannedWindow(torch.autograd.Function):
    """The recurrence alone: inputs are already multiplied."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        gates: Tensor,
        tokens_BT: Tensor | None,
        bias_G: Tensor,
        h_BH: Tensor,
        where_BT: Tensor | None = None,
        start_1H: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gates are (B, T, G), for nobody else's use, or with tokens a table (V, G)."""
        gates, bias_G = gates.detach().contiguous(), bias_G.detach().float().contiguous()
        before_BH = h_BH.detach().float().contiguous()
        start_1H = None if start_1H is None else start_1H.detach().float().contiguous()
        last_BH = before_BH.clone()
        length = gates.shape[1] if tokens_BT is None else tokens_BT.shape[1]
        out_BTH = gates.new_empty(last_BH.shape[0], length, last_BH.shape[1])
        call = {"tokens": tokens_BT, "resets": where_BT, "start": start_1H, "gates": gates, "bias": bias_G}
        _call(kind, {**call, "h": last_BH, "outputs": out_BTH})
        ctx.save_for_backward(gates, tokens_BT, bias_G, before_BH, out_BTH, where_BT, start_1H)
        ctx.kind, ctx.spent = kind, False
        return out_BTH, last_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTH: Tensor, d_last_BH: Tensor) -> tuple[Tensor | None, ...]:
        """In the opposite order; the gates' functions are computed again, and their gradients put in their place."""
        if ctx.spent:
            raise RuntimeError("A scanned window goes backward once: what it saved is overwritten.")
        ctx.spent = True
        gates, tokens_BT, bias_G, before_BH, out_BTH, where_BT, start_1H = ctx.saved_tensors
        d_gates = gates if tokens_BT is None else torch.zeros_like(gates, dtype=torch.float32)
        d_bias_G = torch.zeros_like(bias_G)
        d_h_BH = d_last_BH.to(torch.float32, copy=True).contiguous()
        d_start_1H = None if start_1H is None else torch.zeros_like(start_1H)
        call = {
            "tokens": tokens_BT,
            "resets": where_BT,
            "start": start_1H,
            "gates": gates,
            "bias": bias_G,
            "h": d_h_BH,
            "before": before_BH,
            "outputs": out_BTH,
            "d_outputs": d_out_BTH.to(gates.dtype).contiguous(),
            "d_gates": d_gates,
            "d_bias": d_bias_G,
            "d_start": d_start_1H,
        }
        _call(ctx.kind, call, is_forward=False)
        return None, d_gates.to(gates.dtype), None, d_bias_G, d_h_BH, None, d_start_1H


def _call(kind: str, tensors: dict[str, Tensor | None], *, is_forward: bool = True) -> None:
    outputs = tensors["outputs"]
    assert outputs is not None
    batch_size, length, hidden_size = outputs.shape
    window = _Window(
        threads=torch.get_num_threads(),
        batch=batch_size,
        steps=length,
        hidden=hidden_size,
        is_bf16=outputs.dtype == torch.bfloat16,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    library = _kernels()
    assert library is not None
    getattr(library, f"elman_{kind}")(ctypes.byref(window), int(is_forward))


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    return load_library(SOURCE)
