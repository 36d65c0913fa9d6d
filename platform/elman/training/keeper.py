"""States to resume from: when they are written, what they hold, and how a training goes on from one.

A state is taken between two steps, never while gradients are gathered, and after the
validation of its step where there was one. Where the user stops the training before or
during that validation, the state says so, and the resumed training begins with it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from elman.config.schema import TrainerConfig
from elman.errors import DivergenceError
from elman.tasks.language_modeling import LanguageModeling
from elman.tracking.logger import RunLogger
from elman.tracking.store import StoppedError
from elman.training.callbacks import Checkpoints, Recorder, StopSignals
from elman.training.checkpoint import KEPT, States, UnwrittenError, durable_io, put_back_best
from elman.training.progress import Reporter

UNSEEN_ON_GPU = 9
"""Steps whose loss may not have been looked at there."""


def random_state() -> dict[str, Any]:
    """Where every generator that a training draws from stands, as plain values."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    inner = numpy["state"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy | {"state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back; those of GPUs that there are no more are left out."""
    torch.set_rng_state(state["torch"])
    for index, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, index)
    inner = state["numpy"]["state"]
    np.random.set_state(state["numpy"] | {"state": {**inner, "key": np.array(inner["key"], np.uint32)}})
    random.setstate(state["python"])


class Keeper(L.Callback):
    """Writes states, and leaves when the user says so. It acts after all other callbacks.

    Args:
        config: How often.
        signals: The user's wish to stop.
        recorder: Told how long writing took.
        checkpoints: Knows the best one.
        states: Where states go; None writes none, and only leaves.
        reporter: Told what goes wrong.
    """

    def __init__(
        self,
        config: TrainerConfig,
        signals: StopSignals,
        recorder: Recorder,
        checkpoints: Checkpoints,
        states: States | None,
        reporter: Reporter,
    ) -> None:
        self._config, self._signals, self._recorder = config, signals, recorder
        self._checkpoints, self._states, self._reporter = checkpoints, states, reporter
        self._step = 0
        self._between_steps = True
        self._validated = False
        self._due = False
        self._saved = 0.0
        self._written: list[tuple[int, Path]] = []
        self._resumed: dict[str, Any] | None = None
        self._failing = False

    # What a state holds beside Lightning's own -------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the generators, and put Lightning's counters as they stand between two steps.

        It counts a batch as completed only after the hooks, and from the difference guesses
        where a training was interrupted; none of the guesses runs a validation again.
        """
        assert isinstance(pl_module, LanguageModeling)
        assert isinstance(trainer.logger, RunLogger)
        trainer.logger.settle()  # what this state has done is not done again, so not logged again
        checkpoint["resume"] = {
            "random": random_state(),
            "validated": self._validated,
            "validation_due": self._validates_now(trainer),
            "grad_norm": pl_module.grad_norm,
        }
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["completed"] = counts["processed"]
        for key in [key for key in loop if key.startswith("epoch_loop.val_loop.")]:
            del loop[key]
        # The loader itself may be one window ahead.
        loop["state_dict"]["combined_loader"] = [{"next": progress["current"]["processed"]}]

    @staticmethod
    def _validates_now(trainer: L.Trainer) -> bool:
        fetcher = trainer.fit_loop._data_fetcher
        return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)

    # Going on ----------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what is to be put back once everything stands."""
        self._resumed = checkpoint["resume"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the generators back, and make up for a validation that was not done."""
        assert isinstance(pl_module, LanguageModeling)
        self._step, self._saved = trainer.global_step, time.monotonic()
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        restore_random_state(state["random"])
        norm = state["grad_norm"]
        pl_module.grad_norm = None if norm is None else norm.to(pl_module.device)
        if not state["validated"] and (state["validation_due"] or trainer.should_stop):
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    # When --------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a state where one is due; after the validation, where one follows."""
        assert isinstance(pl_module, LanguageModeling)
        self._between_steps = trainer.global_step != self._step
        self._step, self._validated = trainer.global_step, False
        if not self._between_steps:
            return
        stop = self._signals.received
        every, minutes = self._config.checkpoint_every_steps, self._config.checkpoint_minutes
        self._due = self._due or (every is not None and self._step % every == 0)
        self._due = self._due or (minutes is not None and time.monotonic() - self._saved >= 60 * minutes)
        if stop is not None or (self._due and not self._validates_now(trainer)):
            self._save(trainer, pl_module)
        if stop is not None:
            raise StoppedError(stop)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        """A long validation can be stopped too; it is done again as a whole."""
        assert isinstance(pl_module, LanguageModeling)
        stop = self._signals.received
        if stop is not None:
            self._save(trainer, pl_module)
            raise StoppedError(stop)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a state after every validation."""
        assert isinstance(pl_module, LanguageModeling)
        stop = self._signals.received
        self._validated = self._due = True
        if pl_module.validation is not None and np.isfinite(pl_module.validation.loss):
            self._save(trainer, pl_module)
        if stop is not None:
            raise StoppedError(stop)

    def _save(self, trainer: L.Trainer, task: LanguageModeling) -> None:
        if self._states is None or not self._between_steps:
            return
        begun = time.monotonic()
        with task.raw_weights():
            # A step may have gone astray whose loss was still a number.
            if not all(torch.isfinite(p).all() for p in task.model.parameters()):
                return
            self._write(trainer, self._states)
        self._saved = time.monotonic()
        self._recorder.discount(self._saved - begun)

    def _write(self, trainer: L.Trainer, states: States) -> None:
        def save(path: Path) -> str:
            trainer.save_checkpoint(path)
            return durable_io(trainer).digests.pop(path)

        try:
            if not self._checkpoints.settle(trainer):
                return  # the disk is as full as it was
            digest = self._checkpoints.digest
            path = states.write(save, None if digest is None else (self._checkpoints.best, digest))
        except (OSError, UnwrittenError) as error:
            why = (isinstance(error, OSError) and error.strerror) or str(error)
            self.warn(f"a checkpoint was not written ({why}): training goes on, and the one before it stands")
            return
        self._written = [*self._written, (self._step, path)][-KEPT:]
        self._due = self._failing = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A state whose very next loss was no number had gone astray: the one before it is the last good one."""
        if self._states is None or not isinstance(exception, DivergenceError):
            return
        unseen = UNSEEN_ON_GPU if pl_module.device.type == "cuda" else 0
        for step, path in self._written:
            if step >= trainer.global_step - unseen:
                self._states.discard(path)

    def warn(self, text: str) -> None:
        """Say that the disk does not take checkpoints, once until it does."""
        if not self._failing:
            self._reporter.note(f"warning: {text}.")
        self._failing = True

    def adopt(self, path: Path) -> None:
        """Go on from a state: the best checkpoint becomes what it was then."""
        assert self._states is not None
        best = put_back_best(path, self._states.folder)
        self._checkpoints.digest = None if best is None else best[1]
