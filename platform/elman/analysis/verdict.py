"""Is one model better than another, or was it luck? Losses over the same text, compared in pairs.

Two things vary: the text that a model happens to be tested on, and the seed that it happens
to be trained from. The first is estimated by a paired block bootstrap over contiguous
blocks of the test text, whose tokens depend on one another; the second by the spread over
seeds. Their variances add.

Sources: block bootstrap, Carlstein (1986), doi:10.1214/aos/1176350057; degrees of freedom
of the sum, Satterthwaite (1946), doi:10.2307/3002019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from elman.config.schema import DataConfig
from elman.data.datamodule import evaluation_loader
from elman.models.language_model import LanguageModel
from elman.tasks.hardware import Precision, autocast
from elman.tasks.language_modeling import unroll
from elman.text.prepared import PreparedSplit

BLOCKS = 200
"""Blocks that a test text is cut into; of a short one, fewer, so that each has at least LEAST_TOKENS."""

LEAST_TOKENS = 50
DRAWS = 2000
CONFIDENCE = 0.95


@torch.inference_mode()
def token_losses(
    model: LanguageModel, split: PreparedSplit, data: DataConfig, device: torch.device, precision: Precision
) -> NDArray[np.float64]:
    """Nats of every token of a split (tokens,), in the order of the text, the state carried."""
    model.to(device).eval()
    rows: list[list[NDArray[Any]]] = []
    state = None
    with autocast(precision, device):
        for window in evaluation_loader(split, data, model.start_id):
            here = window.to(device)
            _, dropped, state = unroll(model, here, state)
            logits = model.project(dropped).float()
            nats = F.cross_entropy(logits.flatten(0, 1), here.targets_BT.flatten(), reduction="none")
            nats_BT, there_BT = nats.view_as(here.targets_BT).cpu().numpy(), window.targets_BT.numpy() >= 0
            rows = rows or [[] for _ in nats_BT]
            for row, values, there in zip(rows, nats_BT, there_BT, strict=True):
                row.append(values[there])
    return np.concatenate([np.concatenate(row) for row in rows]).astype(np.float64)


def block_bits(nats: NDArray[np.float64], split: PreparedSplit) -> NDArray[np.float64]:
    """Bits per byte of each block of the text (blocks,), all of one length in tokens: their mean is the text's."""
    blocks = max(1, min(BLOCKS, len(nats) // LEAST_TOKENS))
    edges = np.linspace(0, len(nats), blocks + 1).astype(int)
    sums = np.add.reduceat(nats, edges[:-1])
    per_token = split.bytes / split.tokens
    bits: NDArray[np.float64] = sums / np.diff(edges) / math.log(2) / per_token
    return bits


@dataclass(frozen=True)
class Verdict:
    """How much better one contestant is than another.

    Attributes:
        difference: Bits per byte that ``worse`` spends more, mean over seeds and text; never negative.
        margin: Half the width of its confidence interval.
        text_error: Standard error from the text.
        seed_error: Standard error from the seeds; None with a single one.
    """

    better: str
    worse: str
    difference: float
    margin: float
    text_error: float
    seed_error: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.difference > self.margin

    def __str__(self) -> str:
        if self.is_sure:
            by = f"{self.difference:.3f} ± {self.margin:.3f} bits per byte"
            return f"{self.better} is better than {self.worse} by {by}"
        return (
            f"no difference between {self.better} and {self.worse} "
            f"({self.difference:.3f} ± {self.margin:.3f} bits per byte)"
        )


def compare_blocks(
    first: str, first_SK: NDArray[np.float64], second: str, second_SK: NDArray[np.float64], seed: int = 1
) -> Verdict:
    """Compare two contestants over the same blocks of text.

    Args:
        first: A name.
        first_SK: Its bits per byte, one row a seed, one column a block.
        second: Another name.
        second_SK: Its bits per byte; as many blocks, any number of seeds.
        seed: Of the bootstrap's draws.

    Shape suffixes: S seeds, K blocks.
    """
    from scipy import stats

    assert first_SK.shape[1] == second_SK.shape[1]
    paired_K = second_SK.mean(0) - first_SK.mean(0)
    difference = float(paired_K.mean())
    source = np.random.default_rng(seed)
    picks = source.integers(0, len(paired_K), (DRAWS, len(paired_K)))
    text_error = float(paired_K[picks].mean(1).std(ddof=1)) if len(paired_K) > 1 else 0.0
    parts = [_seed_variance(first_SK), _seed_variance(second_SK)]
    known = [part for part in parts if part is not None]
    seed_error = math.sqrt(sum(variance for variance, _ in known)) if len(known) == 2 else None
    variance = text_error**2 + (seed_error or 0.0) ** 2
    freedom = math.inf
    below = sum(part**2 / degrees for part, degrees in known) if seed_error else 0.0
    if below > 0:
        freedom = variance**2 / below
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    names = (first, second) if difference >= 0 else (second, first)
    return Verdict(*names, abs(difference), quantile * math.sqrt(variance), text_error, seed_error)


def _seed_variance(bits_SK: NDArray[np.float64]) -> tuple[float, int] | None:
    """Variance of the mean over seeds, and its degrees of freedom; None with a single seed."""
    means: Sequence[float] = bits_SK.mean(1)
    if len(means) < 2:
        return None
    return float(np.var(means, ddof=1)) / len(means), len(means) - 1
