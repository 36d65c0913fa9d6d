"""Generation by the compiled kernel of generation.cpp: many tokens a call, for one stream or many.

Weights and activations are rounded to 16 bits of their row's largest (float32 has 24, bfloat16
8), their products summed as integers, the rest computed in float32. On a trained LSTM of 2 × 512
units, the distributions that tokens are drawn from are 1e-5 away from those of double precision
(total variation, mean of 1,500 tokens), against 2e-3 in bfloat16 and 2e-7 in float32: a text
differs from the plain path's only where a draw falls so close to the border between two tokens.
It depends neither on threads nor on the number of samples.

Shape suffixes: B samples, T time steps, E embedding, H hidden, V vocabulary, G gates,
W vectors of sixteen units.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.config.schema import GenerationConfig
from elman.models.compiled import load_library
from elman.models.language_model import LanguageModel
from elman.models.recurrent import RecurrentLayer, RecurrentStack
from elman.models.state import State

SOURCE = Path(__file__).with_name("generation.cpp")
LANES = 16
"""Units in a vector."""
DEPTH = 64
"""Inputs of a matrix are padded to a multiple of it."""
WIDEST = 2**14
"""Inputs up to which the kernel's integer sums cannot overflow."""
TABLE_SIZE = 2**21
"""Numbers up to which the first layer's product is computed once for every token of the vocabulary."""
THREAD_SHARE = 2**17
"""Products in a step that are worth a thread of their own."""
COOLEST = 1e-30
"""Temperature below which the likeliest token is taken: nothing else is left in float32."""

class _Gates(NamedTuple):
    """Which of torch's blocks of rows a stage takes, in its order."""

    input: tuple[int, ...]
    recurrent: tuple[int, ...]


STAGES = {
    "rnn_tanh": (_Gates((0,), (0,)),),
    "rnn_relu": (_Gates((0,), (0,)),),
    "lstm": (_Gates((0, 1, 2, 3), (0, 1, 2, 3)),),
    "gru": (_Gates((2, 0, 1), (0, 1, 2)),),  # between n of the input and n of the state, r and z of both
    "gru_reset_before": (_Gates((0, 1), (0, 1)), _Gates((2,), (2,))),
    "mingru": (_Gates((0, 1), ()),),
    "minlstm": (_Gates((0, 1, 2), ()),),
}
"""By kind, in the order of generation.cpp."""
UNBOUNDED = ("rnn_relu", "mingru", "minlstm")
"""Kinds whose h may grow beyond any bound."""


def _fields(kind: type, *names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names)


class _Matrix(ctypes.Structure):
    _fields_ = (*_fields(ctypes.c_void_p, "planes", "scales", "offsets"), *_fields(ctypes.c_int64, "depth", "gates"))


class _Stage(ctypes.Structure):
    _fields_ = (*_fields(_Matrix, "input", "recurrent"), *_fields(ctypes.c_void_p, "table", "bias"))


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "kind", "units"),
        ("stages", _Stage * 2),
        *_fields(ctypes.c_void_p, "h", "c", "gain", "shift"),
        *_fields(ctypes.c_float, "epsilon", "bound"),
        ("residual", ctypes.c_int64),
    )


class _Generation(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "threads", "batch", "steps", "num_layers", "vocabulary"),
        ("layers", ctypes.POINTER(_Layer)),
        ("output", _Matrix),
        *_fields(ctypes.c_void_p, "output_bias", "embedding"),
        ("embedding_size", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "logits", "uniforms", "ids", "seen"),
        *_fields(ctypes.c_float, "temperature", "top_p", "min_p", "repetition_penalty"),
        ("top_k", ctypes.c_int64),
    )


def is_fast(model: LanguageModel) -> bool:
    """Whether the kernel generates from this model: recurrent, in float32, on the CPU, with an exact softmax."""
    if not isinstance(model.body, RecurrentStack) or model.last_step or model.adaptive is not None:
        return False
    layers = [cast(RecurrentLayer, layer) for layer in model.body.layers]
    widest = max(model.config.embedding_size, *(layer.hidden_size for layer in layers))
    return (
        all(layer.kind in STAGES for layer in layers)
        and widest <= WIDEST
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
        and _kernel() is not None
    )


class FastGenerator:
    """Draws from a model and steps it, from where a prompt has led.

    Args:
        model: One that ``is_fast``; its weights are copied.
        config: How tokens are drawn.
        logits_BV: Scores of the next token.
        state: The carry there.
        bias_V: What is added to logits, −inf for forbidden tokens; or None.
        seen_BV: True where a token has occurred, with a repetition penalty.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: GenerationConfig,
        logits_BV: Tensor,
        state: State,
        bias_V: Tensor | None,
        seen_BV: Tensor | None,
    ) -> None:
        assert isinstance(model.body, RecurrentStack)
        self._kept: list[Tensor] = []  # what the structures point to
        batch_size, vocabulary_size = logits_BV.shape
        self._products = 0
        self._layers = (_Layer * len(state))()
        self._state: list[tuple[Tensor, ...]] = []
        output_bias_V = model.output_bias if bias_V is None else model.output_bias + bias_V
        self._logits_BV = _padded(logits_BV, LANES).contiguous().clone()
        embedding = model.embedding.weight
        needs_embedding = model.body.skips[0]
        with torch.autocast("cpu", enabled=False):
            output_weight_VH = _output_weight(model)
            for i, (layer, part) in enumerate(zip(model.body.layers, state, strict=True)):
                described = self._layer(cast(RecurrentLayer, layer), part, embedding if i == 0 else None)
                norm = model.body.norms[i]
                if isinstance(norm, nn.LayerNorm):
                    described.gain = self._keep(_padded(norm.weight, LANES))
                    described.shift = self._keep(_padded(norm.bias, LANES))
                    described.epsilon = norm.eps
                described.residual = int(model.body.skips[i])
                self._layers[i] = described
                needs_embedding |= i == 0 and not described.stages[0].table
        self._call = _Generation(
            batch=batch_size,
            num_layers=len(state),
            vocabulary=vocabulary_size,
            layers=self._layers,
            output=self._matrix(output_weight_VH.unsqueeze(0), (0,)),
            output_bias=self._keep(_padded(output_bias_V, LANES)),
            embedding=self._keep(_padded(embedding, LANES)) if needs_embedding else None,
            embedding_size=-(-embedding.shape[1] // LANES) * LANES,
            logits=self._logits_BV.data_ptr(),
            seen=None if seen_BV is None else self._keep(seen_BV.to(torch.uint8)),
            temperature=0.0 if config.temperature < COOLEST else config.temperature,
            top_p=config.top_p or 1.0,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            top_k=min(config.top_k or 0, vocabulary_size),
        )
        most = max(1, min(torch.get_num_threads(), self._products * batch_size // THREAD_SHARE))
        self.thread_counts = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
        """Numbers of threads that may be worth a trial: 1, 2, 4 …"""

    def advance(self, uniforms_TB: Tensor, threads: int = 1) -> Tensor:
        """Ids (T, B) of the next tokens, at those quantiles (float64); any number of threads gives the same."""
        uniforms_TB = uniforms_TB.contiguous()
        ids_TB = torch.empty(uniforms_TB.shape, dtype=torch.int64)
        self._call.steps, self._call.threads = len(uniforms_TB), threads
        self._call.uniforms, self._call.ids = uniforms_TB.data_ptr(), ids_TB.data_ptr()
        _library().elman_generate(ctypes.byref(self._call))
        return ids_TB

    @property
    def logits(self) -> Tensor:
        """Scores (B, V) of the token after the last; a view."""
        return self._logits_BV[:, : self._call.vocabulary]

    @property
    def state(self) -> State:
        """The carry after the last token; a view."""
        sizes = [layer.units for layer in self._layers]
        return tuple(
            tuple(tensor[:, :size] for tensor in part) for part, size in zip(self._state, sizes, strict=True)
        )

    def _layer(self, layer: RecurrentLayer, state: tuple[Tensor, ...], embedding_VE: Tensor | None) -> _Layer:
        """Describe a layer; the first one's input are the rows of an embedding."""
        holder = layer.weights
        weight_ih, weight_hh, bias_ih, bias_hh = (
            tensor.detach().view(len(tensor) // layer.hidden_size, layer.hidden_size, *tensor.shape[1:])
            for tensor in cast(
                list[Tensor], [holder.weight_ih_l0, holder.weight_hh_l0, holder.bias_ih_l0, holder.bias_hh_l0]
            )
        )
        state = tuple(_padded(part.float(), LANES).contiguous().clone() for part in state)
        self._state.append(state)
        described = _Layer(kind=list(STAGES).index(layer.kind), units=layer.hidden_size, h=state[0].data_ptr())
        if layer.kind == "lstm":
            described.c = state[1].data_ptr()
        # A GRU's h lies between those before it and ±1; a learned one may begin beyond.
        described.bound = 0.0 if layer.kind in UNBOUNDED else max(1.0, float(state[0].abs().max()))
        for place, gates in enumerate(STAGES[layer.kind]):
            stage = described.stages[place]
            if layer.kind == "gru":
                bias_GH = torch.cat((bias_ih[2:], bias_ih[:2] + bias_hh[:2], bias_hh[2:]))
            else:
                bias_GH = (bias_ih + bias_hh if gates.recurrent else bias_ih)[list(gates.input)]
            stage.bias = self._keep(_vectors(bias_GH))
            if gates.recurrent:
                stage.recurrent = self._matrix(weight_hh, gates.recurrent)
            stage.input.gates = len(gates.input)
            rows_GHI = weight_ih[list(gates.input)]
            if embedding_VE is not None and rows_GHI.shape[:2].numel() * len(embedding_VE) <= TABLE_SIZE:
                products_VGH = F.linear(embedding_VE, rows_GHI.flatten(0, 1))
                stage.table = self._keep(_vectors(products_VGH.view(-1, *rows_GHI.shape[:2])))
            else:
                stage.input = self._matrix(weight_ih, gates.input)
        return described

    def _matrix(self, weight_GHI: Tensor, gates: Sequence[int]) -> _Matrix:
        """Pack those gates of a weight."""
        weight_GHI = weight_GHI.detach().contiguous()
        _, units, inputs = weight_GHI.shape
        outputs = -(-units // LANES) * LANES * len(gates)
        depth = -(-inputs // DEPTH) * DEPTH
        self._products += outputs * depth
        matrix = _Matrix(
            planes=self._keep(torch.empty(outputs * depth * 2, dtype=torch.int8)),
            scales=self._keep(torch.empty(outputs)),
            offsets=self._keep(torch.empty(outputs * 2, dtype=torch.int32)),
            depth=depth,
            gates=len(gates),
        )
        _library().elman_pack(
            ctypes.c_void_p(weight_GHI.data_ptr()),
            ctypes.c_int64(units),
            ctypes.c_int64(inputs),
            (ctypes.c_int64 * len(gates))(*gates),
            ctypes.byref(matrix),
        )
        return matrix

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as this."""
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros at the end of the last dimension, to a multiple."""
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple))


def _vectors(values_GH: Tensor) -> Tensor:
    """Gates side by side for each vector of units: from (…, G, H) to (…, W, G, 16)."""
    padded_GP = _padded(values_GH, LANES)
    return padded_GP.view(*padded_GP.shape[:-1], -1, LANES).transpose(-3, -2)


def _output_weight(model: LanguageModel) -> Tensor:
    """The output layer's one matrix (V, H); where two are tied, their product."""
    if model.output_weight is not None:
        return model.output_weight
    weight_VE = model.embedding.weight[: model.vocabulary_size]
    return weight_VE if model.projection is None else F.linear(weight_VE, model.projection.weight.t())


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    return load_library(SOURCE)


def _library() -> ctypes.CDLL:
    library = _kernel()
    assert library is not None
    return library
