"""What happens between the steps: limits, recording, the best checkpoint, samples."""

from __future__ import annotations

import math
import signal
import textwrap
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from elman.config.schema import TrainerConfig
from elman.tasks.language_modeling import LanguageModeling
from elman.tasks.metrics import Bits, perplexity
from elman.tracking.store import StoppedError
from elman.training.checkpoint import BEST, UnwrittenError, durable_io
from elman.training.loading import model_weights, read_checkpoint
from elman.training.progress import Reporter


class StopSignals:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a wish that the training honours at the end of the step in hand.

    SIGUSR1 is how SLURM announces the end of a job's time. A second signal leaves at once,
    and so does the first where ``at_once`` is set: before and after the training there is no
    step to wait for.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.hurried = False
        self.at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.arm()
        return self

    def arm(self) -> None:
        """Handle the signals from here on; whatever handled them before is put back at the end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                before = signal.signal(number, self._note)
            except ValueError:  # not the main thread: its owner handles signals
                return
            self._before.setdefault(number, before)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.hurried = self.received is not None
        leave = self.at_once or self.hurried
        self.received = number
        if leave:
            raise StoppedError(number)


class Limits(L.Callback):
    """Ends the training: by epochs, steps, minutes or patience.

    It also tells the task how far the training is, which is what the schedule follows.
    """

    def __init__(self, config: TrainerConfig, signals: StopSignals) -> None:
        self._config, self._signals = config, signals
        self.started: float | None = None
        self._before = 0.0
        self._step = 0
        self._best, self._waited = math.inf, 0
        self.reason = "all epochs done"

    @property
    def seconds(self) -> float:
        """Seconds that the training has taken, in this process and in those it was resumed from."""
        return self._before + (0.0 if self.started is None else time.monotonic() - self.started)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on counting."""
        return {"seconds": self.seconds, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._before, self._best, self._waited = state_dict["seconds"], state_dict["best"], state_dict["waited"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock. Lightning has taken SIGTERM for itself by now, and would end as if all were well."""
        self._signals.arm()
        self._signals.at_once = False
        self.started = time.monotonic()
        self._step = trainer.global_step
        if self._step:  # a training that was ended after its last step has nothing left to do
            self._look(trainer)
            self._look_at_patience(trainer)

    def progress(self, trainer: L.Trainer, batch_idx: int) -> float:
        """Share of the training done, by whichever limit is nearest."""
        c, shares = self._config, [0.0]
        if c.max_epochs is not None and math.isfinite(trainer.num_training_batches):
            shares.append((trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches) / c.max_epochs)
        if c.max_steps is not None:
            shares.append(trainer.global_step / c.max_steps)
        if c.max_minutes is not None:
            shares.append(self.seconds / (60 * c.max_minutes))
        return min(1.0, max(shares))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the limits, between steps."""
        assert isinstance(pl_module, LanguageModeling)
        pl_module.progress = self.progress(trainer, batch_idx)
        if trainer.global_step != self._step:  # else the step's gradients are still being gathered
            self._step = trainer.global_step
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        c = self._config
        if c.max_steps is not None and trainer.global_step >= c.max_steps:
            self.reason, trainer.should_stop = f"trainer.max_steps {c.max_steps} reached", True
        elif c.max_minutes is not None and self.seconds >= 60 * c.max_minutes:
            self.reason, trainer.should_stop = f"trainer.max_minutes {c.max_minutes:g} reached", True
        elif c.max_epochs is not None and trainer.is_last_batch and trainer.current_epoch + 1 >= c.max_epochs:
            trainer.should_stop = True  # which validates, wherever trainer.validate_every_steps stands

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count validations without improvement."""
        assert isinstance(pl_module, LanguageModeling)
        if pl_module.validation is None:
            return
        if pl_module.validation.loss < self._best:
            self._best, self._waited = pl_module.validation.loss, 0
        else:
            self._waited += 1
            self._look_at_patience(trainer)

    def _look_at_patience(self, trainer: L.Trainer) -> None:
        if self._config.patience is not None and self._waited >= self._config.patience:
            self.reason = f"no better validation in trainer.patience {self._config.patience}"
            trainer.should_stop = True


class Recorder(L.Callback):
    """Collects the training's figures on the device and passes them on every few steps."""

    def __init__(self, config: TrainerConfig, limits: Limits, reporter: Reporter, train_bits: Bits | None) -> None:
        self._config, self._limits, self._reporter, self._bits = config, limits, reporter, train_bits
        self._nats: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._clock = 0.0
        self._logged = 0
        self.tokens, self.seconds = 0, 0.0
        self.best: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and what is not logged yet."""
        waiting = [torch.stack(values).cpu() if values else None for values in (self._nats, self._tokens)]
        return {"waiting": waiting, "logged": self._logged, "tokens": self.tokens, "seconds": self.seconds,
                "best": dict(self.best)}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._nats, self._tokens = ([] if v is None else list(v.unbind()) for v in state_dict["waiting"])
        self._logged, self.best = state_dict["logged"], dict(state_dict["best"])
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the throughput."""
        self._nats, self._tokens = ([v.to(pl_module.device) for v in values] for values in (self._nats, self._tokens))
        self._clock = time.monotonic()

    def discount(self, seconds: float) -> None:
        """Leave time out of the throughput: it went into something else than training."""
        self._clock += seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step; every log_every_steps, log."""
        self._nats.append(outputs["nats"] * outputs["tokens"])
        self._tokens.append(outputs["tokens"])
        if trainer.global_step % self._config.log_every_steps == 0:
            self._log(trainer, pl_module, batch_idx)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not training time."""
        if not trainer.sanity_checking and self._tokens:
            self._log(trainer, pl_module, trainer.fit_loop.epoch_loop.batch_idx)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, batch_idx: int) -> None:
        assert isinstance(pl_module, LanguageModeling)
        if not self._tokens or trainer.global_step == self._logged:
            return  # nothing new, or the next step's gradients are still being gathered
        self._logged = trainer.global_step
        tokens = int(torch.stack(self._tokens).sum())
        loss = float(torch.stack(self._nats).sum()) / tokens
        self._nats, self._tokens = [], []
        now = time.monotonic()
        spent, self._clock = now - self._clock, now
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + spent
        metrics = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "throughput/tokens_per_second": tokens / max(spent, 1e-9),
            "optimizer/lr": pl_module.lr,
            "epoch": trainer.current_epoch + (batch_idx + 1) / max(1, trainer.num_training_batches)
            if math.isfinite(trainer.num_training_batches)
            else trainer.current_epoch,
        }
        if self._bits is not None:
            metrics["train/bits_per_byte"] = self._bits.bits_per_byte(loss)
        if pl_module.grad_norm is not None:
            metrics["optimizer/grad_norm"] = float(pl_module.grad_norm)
        assert trainer.logger is not None
        trainer.logger.log_metrics(metrics, trainer.global_step)
        share = max(pl_module.progress, 1e-9)
        self._reporter.step(share, self._limits.seconds * (1 - share) / share, metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the validation, and start the throughput's clock again."""
        assert isinstance(pl_module, LanguageModeling)
        if pl_module.validation is None or trainer.sanity_checking:
            return
        metrics = pl_module.validation.metrics("val", pl_module.bits)
        is_best = metrics["val/loss"] < self.best.get("val/loss", math.inf)
        if is_best:
            self.best = metrics
        assert trainer.logger is not None
        epoch = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_idx + 1) / max(
            1.0, trainer.num_training_batches
        )
        trainer.logger.log_metrics(metrics, trainer.global_step)
        self._reporter.validated(epoch, trainer.global_step, metrics, is_best)
        self._clock = time.monotonic()


class Checkpoints(L.Callback):
    """Keeps the checkpoint with the lowest validation loss, written whole or not at all.

    A disk that is full does not end the training: the checkpoint waits in memory, and the
    one before stands.

    Args:
        folder: Where best.ckpt goes.
        extra: What a checkpoint needs to stand alone: architecture, tokenizer, settings.
        warn: Told what went wrong.
    """

    def __init__(self, folder: Path, extra: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._folder, self._extra, self._warn = folder, dict(extra), warn
        self._best_loss = math.inf
        self._waiting: dict[str, Any] | None = None
        self.digest: str | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation loss."""
        return self._folder / BEST

    def state_dict(self) -> dict[str, Any]:
        """What the next validation has to beat."""
        return {"best_loss": self._best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._best_loss = state_dict["best_loss"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint stand alone."""
        checkpoint["elman"] = self._extra

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best. A loss that is no number is never the best."""
        assert isinstance(pl_module, LanguageModeling)
        if pl_module.validation is None or trainer.sanity_checking or not pl_module.validation.loss < self._best_loss:
            return
        self._best_loss = pl_module.validation.loss
        with pl_module.raw_weights():
            try:
                trainer.save_checkpoint(self.best)
            except UnwrittenError as failure:
                kept = {key: value for key, value in failure.checkpoint.items() if key != "optimizer_states"}
                self._waiting = deepcopy(kept)
                self._warn(f"the best checkpoint was not written ({failure}): it waits in memory, and training goes on")
                return
        self._waiting = None
        self.digest = durable_io(trainer).digests[self.best]

    def settle(self, trainer: L.Trainer) -> bool:
        """Whether the best checkpoint is on the disk; writes it where it waits and there is room by now."""
        if self._waiting is not None:
            try:
                durable_io(trainer).save_checkpoint(self._waiting, self.best)
            except UnwrittenError:
                return False
            self._waiting, self.digest = None, durable_io(trainer).digests[self.best]
        return True

    def weights(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """The best weights, from the disk, or from memory where it never took them."""
        if self.settle(trainer):
            return model_weights(read_checkpoint(self.best))
        assert self._waiting is not None
        return model_weights(self._waiting)


class Samples(L.Callback):
    """Writes a sample after every validation, so that one can watch the model learn.

    Args:
        write: Makes the text of a sample.
        record: Takes the whole growing text.
    """

    def __init__(self, write: Callable[[], str], record: Callable[[str], None]) -> None:
        self._write, self._record = write, record
        self._text = ""

    def state_dict(self) -> dict[str, Any]:
        """The text so far."""
        return {"text": self._text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._text = state_dict["text"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and record one."""
        assert isinstance(pl_module, LanguageModeling)
        if trainer.sanity_checking or pl_module.validation is None or not math.isfinite(pl_module.validation.loss):
            return
        bits = pl_module.bits.bits_per_byte(pl_module.validation.loss)
        title = f"step {trainer.global_step}, epoch {trainer.current_epoch + 1}: {bits:.3f} bits per byte"
        # The UI does not break lines.
        lines = [wrapped for line in self._write().split("\n") for wrapped in textwrap.wrap(line, 100) or [""]]
        self._text += "\n".join([f"=== {title} ===", *lines, "", ""])
        self._record(self._text)
