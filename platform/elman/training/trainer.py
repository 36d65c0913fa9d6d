"""The Trainer: Lightning's, with everything that we do ourselves switched off."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence

import lightning as L
import numpy as np
import torch

from elman.config.schema import TrainerConfig
from elman.tasks.hardware import Precision
from elman.tracking.logger import RunLogger
from elman.training.checkpoint import DurableIO
from elman.training.loop import StepLoop


def seed_everything(seed: int) -> None:
    """Seed every generator that a training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_trainer(
    config: TrainerConfig,
    *,
    device: torch.device,
    precision: Precision,
    logger: RunLogger,
    callbacks: Sequence[L.Callback],
) -> L.Trainer:
    """A Trainer whose limits, progress, checkpoints and logging are the callbacks' business."""
    # What it found and what it recommends is not for a user who chose neither.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning asks torch a question that torch has renamed; neither is ours to mend.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    every = None if config.validate_every_steps is None else config.validate_every_steps * config.accumulate_windows
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=-1 if config.max_epochs is None else config.max_epochs,
        accumulate_grad_batches=config.accumulate_windows,
        val_check_interval=every,
        check_val_every_n_epoch=1 if every is None else None,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        # Averaged weights are swapped in for validation; inference tensors would stay behind.
        inference_mode=False,
        logger=logger,
        plugins=[DurableIO(device)],
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit_loop.epoch_loop = StepLoop(trainer)
    return trainer
