"""Lightning's loop over the windows of an epoch, with a step that is only what we use of it.

Lightning's own step asks two dozen hooks, wraps the update into closures, and looks through the
metrics that a module may have logged: 0.8 ms, of a step that may take six. Limits, validation,
counters, callbacks and checkpoints stay its business, and so does the first step after a resume.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from elman.tasks.language_modeling import LanguageModeling


class StepLoop(_TrainingEpochLoop):
    """Trains a LanguageModeling task on one device.

    Of the callbacks it asks ``on_train_batch_start`` and ``on_train_batch_end``; of the task besides
    those the former, ``training_step`` and ``configure_gradient_clipping``.
    """

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one window."""
        if self.restarting:
            super().advance(data_fetcher)
            return
        self.val_loop.restarting = False
        trainer, task = self.trainer, self.trainer.lightning_module
        assert isinstance(task, LanguageModeling)
        window, _, _ = next(data_fetcher)
        index = self.batch_idx + 1
        self.batch_progress.is_last_batch = data_fetcher.done
        if task.device.type != "cpu":
            window = window.to(task.device)
        self.batch_progress.increment_ready()
        for callback in _asked(trainer, "on_train_batch_start"):
            callback.on_train_batch_start(trainer, task, window, index)
        task.on_train_batch_start(window, index)
        self.batch_progress.increment_started()
        outputs = self._step(task, window, index)
        self.batch_progress.increment_processed()
        for callback in _asked(trainer, "on_train_batch_end"):
            callback.on_train_batch_end(trainer, task, outputs, window, index)
        self.batch_progress.increment_completed()

    def _step(self, task: LanguageModeling, window: Any, index: int) -> dict[str, torch.Tensor]:
        trainer, [optimizer] = self.trainer, self.trainer.optimizers
        counts = self.automatic_optimization.optim_progress.optimizer
        gathers = trainer.fit_loop._should_accumulate()
        if not gathers:
            counts.step.increment_ready()
        with trainer.precision_plugin.train_step_context():
            outputs = task.training_step(window, index)
        if index % trainer.accumulate_grad_batches == 0:
            counts.zero_grad.increment_ready()
            counts.zero_grad.increment_started()
            optimizer.zero_grad()
            counts.zero_grad.increment_completed()
        loss = outputs.pop("loss")
        if trainer.accumulate_grad_batches > 1:
            loss = loss / trainer.accumulate_grad_batches
        loss.backward()  # type: ignore[no-untyped-call]
        if not gathers:
            task.configure_gradient_clipping(optimizer)
            optimizer.step()
            counts.step.increment_completed()
        return outputs


def _asked(trainer: L.Trainer, hook: str) -> list[L.Callback]:
    """The callbacks that have a hook of their own."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set, and not declared
    return [one for one in callbacks if getattr(type(one), hook) is not getattr(L.Callback, hook)]
