"""Recurrent layers over a whole window in bfloat16, by the compiled kernel of fused.cpp.

The product of the input is left to torch: ahead of the window, for all its steps in one, or
once per row of a small vocabulary, whose rows the kernel then looks up.

Shape suffixes: B batch, T time steps, I input, H hidden, P hidden padded for the kernel,
G gates × P, C saved columns × P, V rows of a table,
N steps × batch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.models.compiled import has_tiles, load_bf16_library
from elman.models.memory import pooled

SOURCE = Path(__file__).with_name("fused.cpp")
LANES = 16
"""Units in a vector; the kernel's hidden sizes are multiples of it."""
FEWEST_ROWS = 4
"""Rows of a batch from which on matrix tiles pay."""
WIDEST = 4
"""Vectors of sums that are computed together: with more, registers would hold too few rows of them."""


class Rows(NamedTuple):
    """A layer's input as rows of a matrix, chosen by index: an embedding that is not looked up yet."""

    rows_VI: Tensor
    index_BT: Tensor

    def dense(self) -> Tensor:
        """The chosen rows (B, T, I)."""
        return F.embedding(self.index_BT, self.rows_VI)

    def steps(self, begin: int, end: int) -> Rows:
        """Some steps of the window."""
        return Rows(self.rows_VI, self.index_BT[:, begin:end])


class Resets(NamedTuple):
    """Where in a window a layer's state starts anew, as at a document's border."""

    where_BT: Tensor
    """True before whose step the start is put."""
    start: tuple[Tensor, ...]
    """The state of one row (1, H)."""


class Layout(NamedTuple):
    """How the kernel orders a kind of cell."""

    gates: int
    """Blocks of weight_hh."""
    columns: int
    """Blocks that are saved for backward, and that a bias is given for."""
    recurrent: int
    """The first column that the recurrent product feeds; those of the input start at 0."""
    vectors: int
    """Vectors of units that are computed together in the forward product, each with its gates: at most WIDEST."""


LAYOUTS = {
    "rnn_tanh": Layout(1, 1, 0, 4),
    "rnn_relu": Layout(1, 1, 0, 4),
    "lstm": Layout(4, 4, 0, 1),
    "gru": Layout(3, 4, 1, 1),
    "gru_reset_before": Layout(3, 3, 0, 2),
}


class _Window(ctypes.Structure):
    """struct Window of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "batch", "steps", "hidden", "panel", "tiles")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("weight_hh", "bias", "tokens", "table", "input", "h", "c"),
                *("outputs", "before", "resets", "start_h", "start_c", "saved", "reset"),
                *("gates", "d_outputs", "d_h", "d_c", "d_start_h", "d_start_c", "d_table", "d_bias"),
            )
        ),
        ("wants_d_h", ctypes.c_int64),
    )


class _Outer(ctypes.Structure):
    """struct Outer of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "count", "units", "hidden", "gates")),
        ("left", ctypes.c_void_p),
        ("left_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("right", "packed", "sums")),
    )


def is_fused(kind: str, like: Tensor) -> bool:
    """Whether the kernel computes this kind of cell for inputs on ``like``'s device, now."""
    return (
        kind in LAYOUTS
        and like.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and _kernels() is not None
    )


def fused_window(
    kind: str, x: Tensor | Rows, state: tuple[Tensor, ...], weights: list[Tensor], resets: Resets | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer over a window.

    Args:
        kind: One of ``LAYOUTS``.
        x: Input (B, T, I), or rows to choose from.
        state: Each (B, H).
        weights: weight_ih, weight_hh, bias_ih and bias_hh, with torch's layouts.
        resets: Where the state starts anew within the window.

    Returns:
        The h of every step (B, T, H) in bfloat16, a view of time-major memory, and the state
        after the last in float32.

    Raises:
        IndexError: If there is no row of an index.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    hidden_size = weight_hh.shape[1]
    start = () if resets is None else resets.start
    # The smaller of the two is turned: the table of inputs, or the weights that it is made of.
    turns_table = kind == "gru" and isinstance(x, Rows) and x.rows_VI.shape[0] < weight_ih.shape[1]
    if kind == "gru":  # n, whose two biases stay apart, comes first
        if not turns_table:
            weight_ih = torch.roll(weight_ih, hidden_size, 0)
        rz_bias_hh, n_bias_hh = torch.split(bias_hh, [2 * hidden_size, hidden_size])
        bias = torch.cat((bias_ih[2 * hidden_size :], bias_ih[: 2 * hidden_size] + rz_bias_hh, n_bias_hh))
    else:
        bias = bias_ih + bias_hh
    padding = -hidden_size % LANES
    if padding:
        blocks = weight_ih.view(-1, hidden_size, weight_ih.shape[1]).to(torch.bfloat16)  # before there are more
        weight_ih = torch.cat((blocks, blocks.new_zeros(len(blocks), padding, blocks.shape[2])), 1).flatten(0, 1)
        bias = F.pad(bias.view(-1, hidden_size), (0, padding)).flatten()
        state, start = (tuple(F.pad(part, (0, padding)) for part in parts) for parts in (state, start))
    tokens_TB: Tensor | None = None
    if isinstance(x, Rows):
        tokens_TB = x.index_BT.t().contiguous()
        smallest, largest = torch.aminmax(tokens_TB)
        if smallest < 0 or largest >= x.rows_VI.shape[0]:  # the kernel would read what is not there
            raise IndexError(f"index out of range: {smallest} to {largest} of {x.rows_VI.shape[0]} rows")
        inputs = F.linear(x.rows_VI, weight_ih).float()
        if turns_table:
            inputs = torch.roll(inputs, hidden_size + padding, 1)
    else:
        x_TBI = x.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)  # cast and turned in one
        x_TBI = x_TBI.contiguous()  # what is of this type already comes back as a view
        inputs = F.linear(x_TBI, weight_ih)
    if not torch.is_grad_enabled():  # else what backward needs would be kept
        weight_hh, state = weight_hh.detach(), tuple(part.detach() for part in state)
        start = tuple(part.detach() for part in start)
    where_TB = None if resets is None else resets.where_BT.t().contiguous()
    outputs_TBP, *after = _FusedWindow.apply(kind, inputs, tokens_TB, weight_hh, bias, where_TB, *state, *start)  # type: ignore[no-untyped-call]
    if padding:
        outputs_TBP = outputs_TBP[..., :hidden_size]
        after = [part[:, :hidden_size] for part in after]
    return outputs_TBP.transpose(0, 1), tuple(after)


class _FusedWindow(torch.autograd.Function):
    """The recurrence alone: inputs are already multiplied, sizes padded, everything time-major."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        inputs: Tensor,
        tokens_TB: Tensor | None,
        weight_hh: Tensor,
        bias_C: Tensor,
        where_TB: Tensor | None,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """Inputs are (T, B, G), or with tokens a table (V, G); returns outputs (T, B, P), and the state.

        The states are the one before, and with ``where_TB`` the one (1, P) that is put there.
        """
        layout = LAYOUTS[kind]
        num_states = len(states) if where_TB is None else len(states) // 2
        state, start = states[:num_states], [part.detach().float().contiguous() for part in states[num_states:]]
        batch_size, padded_size = state[0].shape
        length = inputs.shape[0] if tokens_TB is None else tokens_TB.shape[0]
        trained = any(ctx.needs_input_grad)
        h_BP, *c = (part.detach().to(torch.float32, copy=True).contiguous() for part in state)
        outputs_TBP = pooled((length + 1, batch_size, padded_size), torch.bfloat16)
        before_TBP = outputs_TBP[:-1] if where_TB is None else pooled((length, batch_size, padded_size), torch.bfloat16)
        saved_TBC = reset_TBP = None
        if trained:
            saved_TBC = pooled((length, batch_size, layout.columns * padded_size), torch.float16)
            if c:
                c_TBP = pooled((length + 1, batch_size, padded_size), torch.float32)
                c_TBP[0] = c[0]
                c = [c_TBP]
        if kind == "gru_reset_before":
            reset_TBP = outputs_TBP.new_empty(length if trained else 1, batch_size, padded_size)
        weight_hh = weight_hh.detach().float().contiguous()
        call = {
            "weight_hh": weight_hh,
            "bias": bias_C.detach().float().contiguous(),
            "tokens": tokens_TB,
            "input" if tokens_TB is None else "table": inputs.detach().contiguous(),
            "h": h_BP,
            "c": c[0] if c else torch.empty_like(h_BP),
            "outputs": outputs_TBP,
            "before": before_TBP,
            "resets": where_TB,
            **dict(zip(("start_h", "start_c"), start, strict=False)),
            "saved": saved_TBC,
            "reset": reset_TBP,
        }
        _call(kind, layout.vectors, call, is_forward=True)
        if trained:
            ctx.set_materialize_grads(False)
            kept = (weight_hh, tokens_TB, before_TBP, saved_TBC, reset_TBP, where_TB)
            ctx.save_for_backward(*kept, *c, *start[1:])
            ctx.kind, ctx.num_rows, ctx.num_starts, ctx.spent = kind, inputs.shape[0], len(start), False
        return (outputs_TBP[1:], h_BP, *(part[-1].clone() if trained else part for part in c))

    @staticmethod
    def backward(ctx: Any, d_outputs_TBP: Tensor | None, *d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gates' gradients over the window; what only adds them up is one product at the end."""
        if ctx.spent:
            raise RuntimeError("A fused window goes backward once: what it saved is overwritten.")
        ctx.spent = True
        weight_hh, tokens_TB, before_TBP, saved_TBC, reset_TBP, where_TB, *c = ctx.saved_tensors
        layout: Layout = LAYOUTS[ctx.kind]
        hidden_size, (batch_size, padded_size) = weight_hh.shape[1], before_TBP.shape[1:]
        gates_TBC = saved_TBC.view(torch.bfloat16)
        d_after = [
            torch.zeros(batch_size, padded_size) if part is None else part.to(torch.float32, copy=True).contiguous()
            for part in d_state
        ]
        d_table_VG = None if tokens_TB is None else torch.zeros(ctx.num_rows, layout.gates * padded_size)
        d_bias_C = torch.zeros(layout.columns * padded_size)
        d_start = [torch.zeros(1, padded_size) for _ in range(ctx.num_starts)]
        call = {
            "weight_hh": weight_hh,
            "tokens": tokens_TB,
            "c": c[0] if c else None,
            "before": before_TBP,
            "resets": where_TB,
            "start_c": c[1] if c[1:] else None,
            "saved": saved_TBC,
            "gates": gates_TBC,
            "d_outputs": None if d_outputs_TBP is None else d_outputs_TBP.to(torch.bfloat16).contiguous(),
            "d_h": d_after[0],
            "d_c": d_after[1] if c else None,
            **dict(zip(("d_start_h", "d_start_c"), d_start, strict=False)),
            "d_table": d_table_VG,
            "d_bias": d_bias_C,
        }
        wants = ctx.needs_input_grad
        _call(ctx.kind, WIDEST, call, is_forward=False, wants_d_h=any(wants[6:]))
        d_weight_hh = None
        if wants[3]:
            gates_NG = gates_TBC[..., layout.recurrent * padded_size :].flatten(0, 1)
            before_NP = before_TBP.flatten(0, 1)
            if reset_TBP is None:
                d_weight_hh = _outer(gates_NG, before_NP, hidden_size)
            else:
                rz_NG, n_NP = torch.split(gates_NG, [2 * padded_size, padded_size], dim=1)
                reset_NP = reset_TBP.flatten(0, 1)
                d_weight_hh = torch.cat(
                    (_outer(rz_NG, before_NP, hidden_size), _outer(n_NP, reset_NP, hidden_size))
                )
        d_inputs = gates_TBC[..., : layout.gates * padded_size] if d_table_VG is None else d_table_VG
        return (None, d_inputs, None, d_weight_hh, d_bias_C, None, *d_after, *d_start)


def _outer(gates_NG: Tensor, before_NP: Tensor, hidden_size: int) -> Tensor:
    """gatesᵀ · before, of the real units: (gates of them × H, H)."""
    count, padded_size = before_NP.shape
    gates = gates_NG.shape[1] // padded_size
    if not _has_tiles():  # a matrix library is as fast then
        sums_GUP = (gates_NG.t() @ before_NP).view(gates, padded_size, padded_size)
        return sums_GUP[:, :hidden_size, :hidden_size].float().view(-1, hidden_size)
    sums = torch.empty(gates * hidden_size, hidden_size)
    packed = pooled((-(-count // 32) * 32, padded_size), torch.bfloat16)
    outer = _Outer(
        threads=torch.get_num_threads(),
        count=count,
        units=padded_size,
        hidden=hidden_size,
        gates=gates,
        left=gates_NG.data_ptr(),
        left_stride=gates_NG.stride(0),
        right=before_NP.data_ptr(),
        packed=packed.data_ptr(),
        sums=sums.data_ptr(),
    )
    library = _kernels()
    assert library is not None
    library.elman_outer(ctypes.byref(outer))
    return sums


def _call(
    kind: str, vectors: int, tensors: dict[str, Tensor | None], *, is_forward: bool, wants_d_h: bool = False
) -> None:
    before, weight_hh = tensors["before"], tensors["weight_hh"]
    assert before is not None
    assert weight_hh is not None
    threads = torch.get_num_threads()
    groups = before.shape[2] // LANES
    window = _Window(
        threads=threads,
        batch=before.shape[1],
        steps=before.shape[0],
        hidden=weight_hh.shape[1],
        panel=min(vectors, -(-groups // threads)),  # narrower than registers allow, before a thread has none
        tiles=_has_tiles() and before.shape[1] >= FEWEST_ROWS,
        wants_d_h=wants_d_h,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    library = _kernels()
    assert library is not None
    getattr(library, f"elman_{kind}")(ctypes.byref(window), int(is_forward))


def _kernels() -> ctypes.CDLL | None:
    return load_bf16_library(SOURCE)


def _has_tiles() -> bool:
    return has_tiles(_kernels())
