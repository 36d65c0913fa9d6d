"""Does it learn? Its loss, a fresh model that knows nothing, and a batch learned by heart."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elman.analysis.finding import Outcome, check, failure, ok, warning
from elman.analysis.specimen import BATCH, BUG, EXACT, STEPS, Specimen, distance, exact, listed, without_dropout
from elman.models.language_model import LanguageModel

FIT_STEPS = 150
FIT_SHARE = 0.25
"""A batch is overfitted when its loss is below this share of its start, or below FIT_NATS."""

FIT_NATS = 0.2
NARROW, NARROW_SHARE = 32, 0.9
"""Of a model of fewer units than that, it is enough that the loss falls below this share."""

FRESH_STEPS = 4
FRESH_NATS = 0.7
"""By how much a fresh model's loss may be beside log V: its logits begin with a spread below one."""


@check("loss")
def loss(specimen: Specimen) -> Outcome:
    """The loss that is computed in parts is the cross-entropy of the logits."""
    model = exact(specimen.model)
    inputs_BT, targets_BT = specimen.batch()
    with torch.no_grad():
        features_BTH = model.features(inputs_BT).dropped_BTH
        found = model.loss(features_BTH, targets_BT) / targets_BT.numel()
        expected = F.cross_entropy(model.project(features_BTH).flatten(0, 1), targets_BT.flatten())
    if not distance(found, expected) <= EXACT:
        return failure(f"{float(found):.6f} nats in parts, {float(expected):.6f} from the logits", BUG)
    return ok("in parts equal to the cross-entropy of the logits")


@check("fresh loss")
def fresh_loss(specimen: Specimen) -> Outcome:
    """A fresh model knows nothing: near the start of a window its loss is near log V."""
    model = exact(
        specimen.model if specimen.is_fresh else LanguageModel.from_architecture(specimen.model.architecture)
    )
    # Few steps: the state of a relu rnn grows with them, by its identity.
    inputs_BT, targets_BT = (tokens.view(-1, FRESH_STEPS) for tokens in specimen.batch())
    with torch.no_grad():
        nats = float(_loss(model, inputs_BT, targets_BT))
        uniform, said = math.log(model.vocabulary_size), "log V"
        if model.adaptive is not None:  # its clusters are equally likely at first, and so are the tokens within
            model.output_bias.zero_()
            nothing_BTH = torch.zeros(*inputs_BT.shape, model.body.output_size, dtype=torch.float64)
            uniform, said = float(model.loss(nothing_BTH, targets_BT)) / targets_BT.numel(), "no preference"
    line = f"{nats:.3f} nats untrained, {said} is {uniform:.3f}"
    if not abs(nats - uniform) <= FRESH_NATS:
        return failure(line, "look at models/initialization.py: training begins from a wrong certainty.")
    return ok(line)


@check("overfitting")
def learning(specimen: Specimen) -> Outcome:
    """Every weight gets a gradient, and one batch can be learned by heart."""
    model = without_dropout(copy.deepcopy(specimen.model)).train().requires_grad_()
    inputs_BT, targets_BT = specimen.batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=_rate(specimen))
    start = nats = float("nan")
    for step in range(FIT_STEPS + 1):
        loss = _loss(model, inputs_BT, targets_BT)
        nats = float(loss.detach())
        start = nats if step == 0 else start
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        if step == 0:
            idle = _not_due(model, targets_BT)
            still = [n for n, p in model.named_parameters() if n not in idle and (p.grad is None or not p.grad.any())]
            if still:
                return failure(f"no gradient reaches {listed(still)}", BUG)
        if nats < max(FIT_SHARE * start, FIT_NATS):
            return ok(f"a batch of {BATCH} × {STEPS} falls from {start:.2f} to {nats:.2f} nats in {step} steps")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    fall = f"a batch of {BATCH} × {STEPS} falls only from {start:.2f} to {nats:.2f} nats in {FIT_STEPS} steps"
    if model.body.output_size < NARROW and nats < NARROW_SHARE * start:
        return warning(f"{fall}, for want of units", "raise model.hidden_size to learn more by heart.")
    return failure(fall, BUG)


def _not_due(model: LanguageModel, targets_BT: Tensor) -> set[str]:
    """Weights that this batch has no use for: those of the adaptive softmax's clusters of which it has no token."""
    if model.adaptive is None:
        return set()
    absent = [k for k, (begin, end) in enumerate(model.adaptive.edges)
              if not ((targets_BT >= begin) & (targets_BT < end)).any()]  # fmt: skip
    return {f"adaptive.{part}.{k}" for part in ("narrow", "tails") for k in absent}


def _rate(specimen: Specimen) -> float:
    """Learning rate: a wide transformer bears less than a recurrence."""
    if specimen.is_fresh:
        return 1e-2
    config = specimen.model.config
    return min(3e-3, 0.3 / config.hidden_size) if config.cell == "transformer" else 3e-3


def _loss(model: LanguageModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs_BT)[0].flatten(0, 1), targets_BT.flatten())
