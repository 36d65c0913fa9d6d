"""Learning rates over time."""

from __future__ import annotations

import math
from typing import Any

from elman.config.schema import OptimizerConfig


class Schedule:
    """The learning rate as a factor on ``optimizer.lr``.

    Cosine: Loshchilov & Hutter (2017), arXiv:1608.03983, without restarts. Linear: Defazio et
    al. (2023), arXiv:2310.07831. One-cycle: Smith & Topin (2018), arXiv:1708.07120: from 1/25 up
    over the first 30 %, then down by a cosine. Step: Zaremba et al. (2014), arXiv:1409.2329.
    Only plateau has a memory.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._scale = 1.0
        self._best = math.inf
        self._waited = 0

    def factor(self, *, step: int, progress: float, epoch: int) -> float:
        """The factor before a step.

        Args:
            step: Optimizer steps done.
            progress: Share of the training done, in [0, 1]: of steps, or of minutes.
            epoch: Epochs completed.
        """
        c = self._config
        warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        progress = min(max(progress, 0.0), 1.0)
        if c.schedule == "cosine":
            return warm * self._cosine(1.0, c.final_lr_fraction, progress)
        if c.schedule == "linear":
            return warm * (1 + (c.final_lr_fraction - 1) * progress)
        if c.schedule == "one_cycle":
            if progress < 0.3:
                return warm * self._cosine(1 / 25, 1.0, progress / 0.3)
            return warm * self._cosine(1.0, c.final_lr_fraction, (progress - 0.3) / 0.7)
        if c.schedule == "step":
            decays = 0
            if epoch >= c.decay_start_epoch:
                decays = (epoch - c.decay_start_epoch) // c.decay_every_epochs + (1 if c.decay_start_epoch else 0)
            return warm * c.decay_factor**decays
        if c.schedule == "plateau":
            return warm * max(self._scale, c.final_lr_fraction)
        return warm

    @staticmethod
    def _cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    def validated(self, loss: float) -> None:
        """Tell plateau the newest validation loss."""
        if loss < self._best:
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self._config.decay_patience:
            self._scale, self._waited = self._scale * self._config.decay_factor, 0

    def state_dict(self) -> dict[str, Any]:
        """Plateau's memory."""
        return {"scale": self._scale, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take plateau's memory back."""
        self._scale, self._best, self._waited = state["scale"], state["best"], state["waited"]
