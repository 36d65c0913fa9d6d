"""Dropout: off in evaluation, and in training masks as the configuration says.

Masks are seen as they are drawn: every place of dropout is fed ones, so that what leaves it is its mask.

Shape suffixes: B batch, T time steps, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from elman.analysis.finding import Outcome, check, failure, ok
from elman.analysis.kernels import LayerCase
from elman.analysis.specimen import BUG, EXACT, Specimen, distance, exact, random_tokens, without_dropout
from elman.config.schema import ModelConfig, Place
from elman.models.dropout import drop_weight
from elman.models.language_model import LanguageModel
from elman.models.recurrent import RecurrentLayer, RecurrentStack

BATCH, STEPS, TYPES = 8, 24, 4
"""Windows that hold few types of tokens, each many times: word dropout is by type or by occurrence."""

SIGMAS = 4.5
"""By which a share of dropped units may be off; the random numbers are the same at each examination."""

PLACES: tuple[Place, ...] = ("embedding", "input", "layer", "output")


@check("evaluation")
def evaluation(specimen: Specimen) -> Outcome:
    """In evaluation nothing is dropped, nor scaled: the logits are those of a model without dropout."""
    model = exact(specimen.model)
    bare = without_dropout(exact(specimen.model)).train()
    tokens_BT = random_tokens(model)
    with torch.no_grad():
        once_BTV, again_BTV, bare_BTV = model(tokens_BT)[0], model(tokens_BT)[0], bare(tokens_BT)[0]
    if distance(once_BTV, again_BTV) > EXACT:
        return failure("two evaluations differ: something is still random", BUG)
    if distance(once_BTV, bare_BTV) > EXACT:
        return failure("the logits are not those of the same weights without dropout", BUG)
    return ok("repeatable, and equal to the same weights without dropout")


@check("dropout masks")
def masks(specimen: Specimen) -> Outcome:
    """Masks are constant over a window where model.variational says so, and differ from step to step elsewhere."""
    model = copy.deepcopy(specimen.model).train()
    faults = mask_faults(model)
    for number, layer in enumerate((m for m in model.modules() if isinstance(m, RecurrentLayer)), 1):
        if layer.weight_dropout and not _keeps_weight_mask(layer.double()):
            faults.append(f"the dropped recurrent weights of layer {number} are not those of one mask per window")
    if faults:
        return failure("; ".join(faults[:3]), BUG)
    config = model.config
    said = [
        f"{place} {p:g} {'per window' if place in config.variational else 'per step'}" for place, p in places(config)
    ]
    said += [f"recurrent weights {config.weight_dropout:g} per window"] if config.weight_dropout else []
    return ok(", ".join(said) or "no dropout is set")


def _keeps_weight_mask(layer: RecurrentLayer) -> bool:
    case = LayerCase(layer)
    with torch.no_grad():
        torch.manual_seed(1)
        out_BTH, _ = layer(case.x_BTI, case.state)
        torch.manual_seed(1)
        case.weights = case.weights._replace(weight_hh=drop_weight(case.weights.weight_hh, layer.weight_dropout))
        return distance(out_BTH, case.written_out(case.x_BTI, case.state)[0]) <= EXACT


def places(config: ModelConfig) -> list[tuple[Place, float]]:
    """Where this architecture drops activations, and how many."""
    there = [place for place in PLACES if place != "layer" or config.num_layers > 1 or config.cell == "transformer"]
    return [(place, config.dropout_at(place)) for place in there if config.dropout_at(place) > 0]


def mask_faults(model: LanguageModel) -> list[str]:
    """What is wrong with the masks of a model in training mode, by its configuration."""
    config, faults = model.config, []
    for place, p in places(config):
        for module in _modules(model, place):
            tokens_BT = torch.randint(min(TYPES, model.vocabulary_size), (BATCH, STEPS))
            padded = model.last_step and place != "output"
            steps = config.max_sequence_length if padded else STEPS
            windows = [_mask(model, module, tokens_BT, steps) for _ in range(2)]
            variational = place in config.variational
            fault = _fault(windows, tokens_BT, p, variational, padded, is_word=place == "embedding")
            if fault:
                faults.append(f"{place} dropout {fault}")
                break
    return faults


def _modules(model: LanguageModel, place: Place) -> list[nn.Module]:
    match place:
        case "embedding":
            return [model.word_dropout]
        case "input":
            return [model.input_dropout]
        case "output":
            return [model.output_dropout]
        case "layer":
            if isinstance(model.body, RecurrentStack):
                return list(model.body.dropouts)[1:]
            return [cast(nn.Module, block.dropout) for block in model.body.layers]


def _mask(model: LanguageModel, module: nn.Module, tokens_BT: Tensor, steps: int) -> Tensor | None:
    """What a place makes of ones in one window, (N, T, H), of words (N, T).

    None where it is not passed, or not window by window.
    """
    seen: list[Tensor] = []

    def ones(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.ones_like(given[0]), *given[1:])

    def keep(_: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        seen.append(out.detach())

    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(module.register_forward_hook(keep).remove)
        if module is not model.word_dropout:  # which gives its mask itself
            hooks.callback(module.register_forward_pre_hook(ones).remove)
        model(tokens_BT)
    if not seen:
        return None
    drawn = torch.cat(seen, dim=1)  # a window that goes through in pieces is one window still
    return drawn[:, :steps] if drawn.shape[1] % steps == 0 else None


def _fault(
    windows: list[Tensor | None], tokens_BT: Tensor, p: float, variational: bool, padded: bool, *, is_word: bool
) -> str | None:
    first, second = windows
    if first is None or second is None:
        return "is not passed once by every step of a window"
    dropped = first == 0
    kept = first[~dropped]
    if not torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-5):
        return f"does not scale what it keeps by 1 / (1 − {p:g})"
    if is_word:
        groups = list(_by_type(dropped, tokens_BT)) if not padded else []
        draws, mixed = (len(groups) if variational else dropped.numel()), any(g.any() != g.all() for g in groups)
        if padded:
            return None  # windows overlap there, and padding is a type of its own
    else:
        draws = dropped[:, 0].numel() if variational else dropped.numel()
        mixed = bool((dropped != dropped[:, :1]).any())
    if variational and mixed:
        return "is variational, and redraws its mask inside a window"
    if not variational and not mixed and dropped.any():
        return "is not variational, and keeps one mask for a whole window"
    share, spread = float(dropped.float().mean()), (p * (1 - p) / draws) ** 0.5
    if abs(share - p) > SIGMAS * spread:
        return f"drops {share:.0%} where {p:.0%} is set"
    if not is_word and int(dropped.sum()) > 8 and torch.equal(first, second):
        return "repeats the mask of the window before"
    return None


def _by_type(dropped_BT: Tensor, tokens_BT: Tensor) -> Iterator[Tensor]:
    for token in set(tokens_BT.flatten().tolist()):
        yield dropped_BT[tokens_BT == token]
