"""The task: predict the next token, by truncated back-propagation through time.

Shape suffixes: B batch, T time steps, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from elman.config.schema import OptimizerConfig
from elman.errors import DivergenceError
from elman.models.language_model import LanguageModel
from elman.models.state import State, detach
from elman.tasks.hardware import Precision, autocast
from elman.tasks.metrics import Bits, Scores, Tally, count_correct
from elman.tasks.optimizers import NTASGD, build_optimizer, clip_gradients
from elman.tasks.schedule import Schedule

REMEDIES = "lower optimizer.lr, lower optimizer.max_grad_norm, or set trainer.precision fp32"


class Windowed(Protocol):
    """A window of the stream, as elman.data.windows.Window gives it."""

    @property
    def inputs_BT(self) -> Tensor:  # noqa: N802 - a field there
        """Token ids."""
        ...

    @property
    def targets_BT(self) -> Tensor:  # noqa: N802 - a field there
        """Next tokens, or torch's ignore index."""
        ...

    @property
    def resets_BT(self) -> Tensor | None:  # noqa: N802 - a field there
        """Where the state is reset."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether a pass begins."""
        ...


def unroll(model: LanguageModel, window: Windowed, state: State | None) -> tuple[Tensor, Tensor, State]:
    """Run the model over one window, resetting the state where the window says so.

    Returns:
        The last layer's output before and after dropout, each (B, T, H), and the carry, attached.
    """
    if state is None or window.is_first:
        state = model.initial_state(window.inputs_BT.shape[0])
    features = model.features(window.inputs_BT, state, window.resets_BT)
    return features.raw_BTH, features.dropped_BTH, features.state


def summed_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, nats; in single precision where the logits are in half."""
    if not logits_BTV.is_contiguous():  # of time-major features; the sum knows no order, and a copy costs
        logits_BTV, targets_BT = logits_BTV.transpose(0, 1), targets_BT.t()
    logits_BTV = _at_least_single(logits_BTV)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def model_loss(model: LanguageModel, features_BTH: Tensor, targets_BT: Tensor) -> Tensor:
    """``summed_loss`` of the features, without whole logits where that pays."""
    if model.scores_in_parts(targets_BT.numel()):
        return model.loss(features_BTH, targets_BT)
    return summed_loss(model.project(features_BTH), targets_BT)


def _at_least_single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def score_window(model: LanguageModel, window: Windowed, state: State | None, tally: Tally) -> State:
    """Add one window's loss and accuracy to ``tally``; returns the carry."""
    _, dropped, state = unroll(model, window, state)
    if model.scores_in_parts(window.targets_BT.numel()):
        loss, correct = model.scores(dropped, window.targets_BT)
    else:
        logits = model.project(dropped)
        loss, correct = summed_loss(logits, window.targets_BT), count_correct(logits, window.targets_BT)
    tally.add(loss, correct, (window.targets_BT >= 0).sum())
    return state


@torch.inference_mode()
def evaluate(model: LanguageModel, windows: Iterable[Any], device: torch.device, precision: Precision) -> Scores:
    """Score a whole text, its state carried from start to end.

    Args:
        model: Moved to ``device`` and put into evaluation mode; its mode is restored.
        windows: One pass over the text.
        device: Where to compute.
        precision: Arithmetic.
    """
    was_training = model.training
    model.to(device).eval()
    tally, state = Tally(), None
    try:
        with autocast(precision, device):
            for window in windows:
                state = score_window(model, window.to(device), state, tally)
    finally:
        model.train(was_training)
    return tally.scores()


class LanguageModeling(L.LightningModule):
    """Trains a language model on windows of a stream.

    The carry lives on the module, detached after every window: gradients stop there, the
    state does not. Validation has a carry of its own.

    Args:
        model: The network.
        config: Optimizer, schedule and regularisation.
        bits: The validation split's sizes, for bits per byte.
        sequence_length: Nominal window, tokens; the learning rate follows windows drawn around it.
        scale_lr: Whether windows are drawn around it.

    Source of AR and TAR: Merity et al. (2017), arXiv:1708.01009.
    """

    def __init__(
        self, model: LanguageModel, config: OptimizerConfig, *, bits: Bits, sequence_length: int, scale_lr: bool = False
    ) -> None:
        super().__init__()
        self.model, self.config, self.bits = model, config, bits
        self.schedule = Schedule(config)
        self.progress = 0.0
        self.grad_norm: Tensor | None = None
        self.validation: Scores | None = None
        self.in_averaged_weights = False
        self._sequence_length, self._scale_lr = sequence_length, scale_lr
        self._carry: State | None = None
        self._evaluation_carry: State | None = None
        self._averaged: dict[str, Tensor] | None = None
        self._tally = Tally()

    # Training ---------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """A pass begins with a new state."""
        self._carry = None

    def training_step(self, window: Any, batch_idx: int) -> dict[str, Tensor]:
        """One window: forward, loss, and the carry for the next.

        Raises:
            DivergenceError: The loss is NaN or infinite; the weights are those before this step.
        """
        raw, dropped, state = unroll(self.model, window, self._carry)
        self._carry = detach(state)
        tokens = (window.targets_BT >= 0).sum()
        nats = model_loss(self.model, dropped, window.targets_BT) / tokens
        self._check_finite(nats)
        loss = nats
        if self.config.activation_regularization:
            loss = loss + self.config.activation_regularization * _at_least_single(dropped).pow(2).mean()
        if self.config.temporal_activation_regularization and raw.shape[1] > 1:
            change = _at_least_single(raw[:, 1:] - raw[:, :-1])
            loss = loss + self.config.temporal_activation_regularization * change.pow(2).mean()
        return {"loss": loss, "nats": nats.detach(), "tokens": tokens}

    def _check_finite(self, nats: Tensor) -> None:
        # Looking at a number on a GPU waits for it, and every step would wait.
        if nats.device.type == "cuda" and self.trainer.fit_loop.epoch_loop.batch_idx % 10:
            return
        if not torch.isfinite(nats.detach()).item():
            raise DivergenceError(
                f"training diverged: the loss is {nats.item()} at step {self.trainer.global_step + 1}. "
                f"Usual remedies: {REMEDIES}."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The update rule; the schedule sets its rate before every step."""
        return build_optimizer(self.model, self.config)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step to come."""
        factor = self.schedule.factor(
            step=self.trainer.global_step, progress=self.progress, epoch=self.trainer.current_epoch
        )
        if self._scale_lr:
            factor *= batch.inputs_BT.shape[1] / self._sequence_length
        for group in self._optimizer().param_groups:
            group["lr"] = self.config.lr * factor * group.get("lr_factor", 1.0)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the global norm, and keep the norm: it is the first thing to look at when training fails."""
        self.grad_norm = clip_gradients(self.model.parameters(), self.config.max_grad_norm, _unwrapped(optimizer))

    def _optimizer(self) -> torch.optim.Optimizer:
        return _unwrapped(self.trainer.optimizers[0])

    @property
    def lr(self) -> float:
        """The rate of the newest step."""
        return float(self._optimizer().param_groups[0]["lr"])

    # Validation -------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Start a fresh carry; put averaged weights in place where there are any."""
        self._evaluation_carry, self._tally = None, Tally()
        self._swap_averages()

    def validation_step(self, window: Any, batch_idx: int) -> None:
        """Score one window, from its own carry."""
        self._evaluation_carry = score_window(self.model, window, self._evaluation_carry, self._tally)

    def on_validation_epoch_end(self) -> None:
        """Sum up; the schedule and the averaging trigger learn of it."""
        self.validation = self._tally.scores()
        if self.trainer.sanity_checking:
            return
        self.schedule.validated(self.validation.loss)
        optimizer = self._optimizer()
        if isinstance(optimizer, NTASGD) and not self.in_averaged_weights:
            optimizer.validated(self.validation.loss)

    def on_validation_end(self) -> None:
        """Put the raw weights back; callbacks have seen the averaged ones by now."""
        if self.in_averaged_weights:
            self._swap_averages()

    def _swap_averages(self) -> None:
        optimizer = self._optimizer() if self.trainer.optimizers else None
        if isinstance(optimizer, NTASGD) and optimizer.swap():
            self.in_averaged_weights = not self.in_averaged_weights

    # Checkpoints ------------------------------------------------------------------------

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        """Save from here: the raw weights, which training goes on from, with the averaged ones beside them."""
        if not self.in_averaged_weights:
            yield
            return
        self._averaged = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()
            self._averaged = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of: the carry, the schedule's memory."""
        checkpoint["carry"] = self._carry
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["progress"] = self.progress
        checkpoint["averaged"] = self._averaged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self._carry = checkpoint["carry"]
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.progress = checkpoint["progress"]


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    # Lightning may wrap it to count steps.
    return getattr(optimizer, "optimizer", optimizer)
