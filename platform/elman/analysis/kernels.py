"""The fast kernels against the equations of models/cells.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from elman.analysis.finding import Outcome, check, failure, ok
from elman.analysis.specimen import BATCH, BUG, EXACT, STEPS, Specimen, distance, exact
from elman.models.cells import CELLS, CellWeights, unroll
from elman.models.fused import is_fused
from elman.models.recurrent import RecurrentLayer
from elman.models.scan import is_scanned

ROUNDED = 0.03
"""Relative distance of a window in bfloat16 from the exact one; its steps are of 0.4 to 0.8 percent."""


@check("kernels")
def kernels(specimen: Specimen) -> Outcome:
    """The fast kernels compute what cells.py writes out, forward and backward; in bf16 the compiled one."""
    layers = [layer for layer in specimen.model.modules() if isinstance(layer, RecurrentLayer)]
    if not layers:
        return ok("a transformer has no recurrence to compare")
    compiled = False
    for number, original in enumerate(layers, 1):
        layer = exact(original)
        case = LayerCase(layer)
        expected = case.results(case.written_out)
        for found, wanted in zip(case.results(layer), expected, strict=True):
            if not distance(found, wanted) <= EXACT:
                apart = distance(found, wanted)
                return failure(f"layer {number} ({layer.kind}) is not its equations, by {apart:.1e}", BUG)
        weight_ih = cast(Tensor, layer.float().weights.weight_ih_l0)
        with torch.autocast("cpu", torch.bfloat16):
            if not (is_fused(layer.kind, weight_ih) or is_scanned(layer.kind, weight_ih)):
                continue
            compiled = True
            rounded = case.results(layer, torch.float32)
        apart = _norm_distance(rounded[0], expected[0])
        if not apart <= ROUNDED:
            return failure(f"the compiled kernel is {apart:.1%} away from the equations of layer {number}", BUG)
    said = f"{layers[0].kind}: equal to the written-out equations, forward and backward"
    return ok(f"{said}; in bf16 the compiled one to {ROUNDED:.0%}" if compiled else said)


class LayerCase:
    """Random inputs and states of one layer, the same for each way to compute it."""

    def __init__(self, layer: RecurrentLayer) -> None:
        holder = cast(Any, layer.weights)
        self.kind = layer.kind
        self.weights = CellWeights(holder.weight_ih_l0, holder.weight_hh_l0, holder.bias_ih_l0, holder.bias_hh_l0)
        self.x_BTI = torch.randn(BATCH, STEPS, holder.weight_ih_l0.shape[1], dtype=torch.float64)
        self.state = tuple(
            0.5 * torch.randn(BATCH, layer.hidden_size, dtype=torch.float64) for _ in range(layer.num_states)
        )
        self.factors_BTH = torch.randn(BATCH, STEPS, layer.hidden_size, dtype=torch.float64)

    def written_out(self, x_BTI: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """By the equations."""
        return unroll(CELLS[self.kind], x_BTI, state, self.weights)

    def results(self, compute: Callable[..., Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Outputs, last state, and the gradient of the input."""
        x_BTI = self.x_BTI.to(dtype).requires_grad_()
        out_BTH, state = compute(x_BTI, tuple(part.to(dtype) for part in self.state))
        [grad] = torch.autograd.grad((out_BTH * self.factors_BTH.to(dtype)).sum(), x_BTI)
        return [out_BTH.detach().double(), *(part.detach().double() for part in state), grad.double()]


def _norm_distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
