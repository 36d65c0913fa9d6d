"""Samplers and pruners by name."""

from __future__ import annotations

import hashlib
import warnings

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from elman.config.search import StudyConfig


def build_sampler(config: StudyConfig, number: int) -> BaseSampler:
    """The sampler that draws trial ``number``.

    Its seed is made of the study's and the trial's number: the same study draws the same
    trials however often it was interrupted, and never the same one twice.

    Sources: TPE, Bergstra et al. (2011), with Falkner et al.'s (2018, arXiv:1807.01774)
    multivariate kernels and, for trials side by side, Ginsbourger et al.'s (2010) constant liar;
    CMA-ES, Hansen (2016), arXiv:1604.00772; NSGA-II, Deb et al. (2002), doi:10.1109/4235.996017.
    """
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        # That an interface of Optuna's may change is ours to follow.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, group=True)
        if config.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if config.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if config.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        # The points of a grid are enqueued; nothing is left to draw.
        return optuna.samplers.RandomSampler(seed=seed)


def build_pruner(config: StudyConfig, validations: int | None) -> BasePruner:
    """The pruner.

    Args:
        config: Names it.
        validations: How many a whole training reports; None where that is not known.

    Sources: successive halving, Li et al. (2020), arXiv:1810.05934; Hyperband, Li et al. (2018),
    arXiv:1603.06560; Wilcoxon's signed-rank test over folds, Wilcoxon (1945).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.pruner == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=config.pruner_startup, n_warmup_steps=1)
        if config.pruner == "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        if config.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=validations or "auto")
        if config.pruner == "wilcoxon":
            return optuna.pruners.WilcoxonPruner(p_threshold=0.1)
        if config.pruner == "patience":
            return optuna.pruners.PatientPruner(None, patience=config.pruner_patience)
    return optuna.pruners.NopPruner()
