"""A stack of recurrent layers on torch's fast kernels, or on the compiled ones of fused.py and scan.py.

Each layer is a module of its own, so that widths, dropout, norms and residuals between
layers are ours to place. Everything runs batch-first: on CPU torch's kernels are as fast so as
time-major, and on GPU cuDNN transposes once; the outputs of fused.py are batch-first views of
time-major memory.

Shape suffixes: B batch, T time steps, I input, H hidden.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from elman.config.schema import ModelConfig
from elman.models.dropout import Dropout, drop_weight
from elman.models.fused import Resets, Rows, fused_window, is_fused
from elman.models.initialization import initialize_recurrent
from elman.models.kernels import STEPS, WEIGHT_HOLDERS, WINDOWS, LayerState, Weights
from elman.models.normalization import LayerNorm
from elman.models.scan import is_scanned, scanned_window
from elman.models.state import State, expand, pieces, replace_rows


class RecurrentLayer(nn.Module):
    """One recurrent layer: torch's own, the textbook's GRU, or a minimal cell.

    The kernels are called directly, not through the module that holds the weights: weight
    dropout replaces one of them, which torch.nn.RNNBase does not allow for (it keeps a list
    of its own), and a call with a batch of one is quicker.
    """

    def __init__(self, config: ModelConfig, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kind = f"rnn_{config.nonlinearity}" if config.cell == "rnn" else str(config.cell)
        self.weight_dropout = config.weight_dropout
        self.hidden_size = hidden_size
        self.num_states = 2 if self.kind == "lstm" else 1
        self.weights = WEIGHT_HOLDERS[self.kind](input_size, hidden_size)
        initialize_recurrent(self.weights, kind=self.kind, forget_bias=config.forget_bias)
        learned = config.initial_state == "learned"
        self.initial = nn.ParameterList(
            [nn.Parameter(torch.zeros(hidden_size)) for _ in range(self.num_states if learned else 0)]
        )

    def initial_state(self) -> LayerState:
        """The state of one row (1, H) at the start of a text."""
        if len(self.initial) > 0:
            return tuple(cast(Tensor, parameter).unsqueeze(0) for parameter in self.initial)
        bias = cast(Tensor, self.weights.bias_ih_l0)
        return tuple(bias.new_zeros(1, self.hidden_size) for _ in range(self.num_states))

    def forward(
        self, x: Tensor | Rows, state: LayerState, resets_BT: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Run over a window (B, T, I); returns the h of every step (B, T, H), and the state after the last.

        The state is put back to the initial one before the steps where ``resets_BT`` is True.
        Single steps without gradients, as in generation, have kernels of their own.
        """
        holder = self.weights
        weights = cast(Weights, [holder.weight_ih_l0, holder.weight_hh_l0, holder.bias_ih_l0, holder.bias_hh_l0])
        if self.training and self.weight_dropout:
            weights[1] = drop_weight(weights[1], self.weight_dropout)
        resets = None if resets_BT is None else Resets(resets_BT, self.initial_state())
        if not _is_step(x) and is_fused(self.kind, weights[1]):
            return fused_window(self.kind, x, state, weights, resets)
        if _autocast_without_hardware(weights[0]):
            # Where the processor does not multiply in bfloat16, oneDNN's LSTM refuses it and the others crawl.
            with torch.autocast("cpu", enabled=False):
                return self._run(x if isinstance(x, Rows) else x.float(), state, weights, resets)
        return self._run(x, state, weights, resets)

    def _run(
        self, x: Tensor | Rows, state: LayerState, weights: Weights, resets: Resets | None
    ) -> tuple[Tensor, LayerState]:
        is_step = _is_step(x)
        if not is_step and is_scanned(self.kind, weights[0]):
            return scanned_window(self.kind, x, state, weights, resets)
        if resets is not None:  # the other kernels carry every row alike: the window is cut where one starts anew
            outputs = []
            for begin, end, rows_B in pieces(resets.where_BT):
                if rows_B is not None:
                    (state,) = replace_rows((state,), (resets.start,), rows_B)
                piece = x.steps(begin, end) if isinstance(x, Rows) else x[:, begin:end]
                out_BTH, state = self._run(piece, state, weights, None)
                outputs.append(out_BTH)
            return torch.cat(outputs, 1), state
        x_BTI = x.dense() if isinstance(x, Rows) else x
        state = tuple(part.to(x_BTI.dtype) for part in state)  # autocast leaves them in mixed types
        if is_step:
            state = STEPS[self.kind](x_BTI[:, 0], state, weights)
            return state[0].unsqueeze(1), state
        return WINDOWS[self.kind](x_BTI, state, weights, self.training)


class RecurrentStack(nn.Module):
    """Layers over one another, with dropout, normalisation and residual connections between.

    Layer l computes x + norm(cell(dropout(x))): the residual path skips the dropout.

    Source: Zaremba et al. (2014), arXiv:1409.2329 (dropout skips recurrent edges); Wu et al.
    (2016), arXiv:1609.08144, section 3.1 (residual connections); Ba et al. (2016),
    arXiv:1607.06450 (layer normalisation, here of a layer's output and not inside its gates,
    so that the fast kernels serve).
    """

    def __init__(self, config: ModelConfig, input_size: int) -> None:
        super().__init__()
        sizes = [config.hidden_size] * (config.num_layers - 1) + [config.last_hidden_size or config.hidden_size]
        input_sizes = [input_size, *sizes[:-1]]
        self.output_size = sizes[-1]
        self.layers = nn.ModuleList(
            RecurrentLayer(config, before, size) for before, size in zip(input_sizes, sizes, strict=True)
        )
        self.norms = nn.ModuleList(LayerNorm(size) if config.layer_norm else nn.Identity() for size in sizes)
        self.skips = [
            config.residual and before == size for before, size in zip(input_sizes, sizes, strict=True)
        ]
        variational = "layer" in config.variational
        self.dropouts = nn.ModuleList(  # the first layer's input has a place, and a dropout, of its own
            Dropout(config.dropout_at("layer") if i > 0 else 0.0, variational=variational) for i in range(len(sizes))
        )

    def initial_state(self, batch_size: int) -> State:
        """The state of ``batch_size`` rows at the start of a text."""
        return expand(tuple(cast(RecurrentLayer, layer).initial_state() for layer in self.layers), batch_size)

    def forward(
        self, x: Tensor | Rows, state: State, resets_BT: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run a window (B, T, I) through all layers; returns the last one's output (B, T, H), and the carry."""
        after = []
        layers = zip(self.layers, self.norms, self.dropouts, self.skips, state, strict=True)
        for layer, norm, dropout, skip, before in layers:
            out_BTH, layer_state = layer(x if isinstance(x, Rows) else dropout(x), before, resets_BT)
            after.append(layer_state)
            out_BTH = norm(out_BTH)
            x = (x.dense() if isinstance(x, Rows) else x) + out_BTH if skip else out_BTH
        assert isinstance(x, Tensor)
        return x, tuple(after)


def _is_step(x: Tensor | Rows) -> bool:
    return (x.index_BT if isinstance(x, Rows) else x).shape[1] == 1 and not torch.is_grad_enabled()


def _autocast_without_hardware(like: Tensor) -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        and like.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
