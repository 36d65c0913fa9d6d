"""Scoring: a model on the splits of its own corpus, or on any text."""

from __future__ import annotations

import torch

from elman.config.schema import DataConfig, ExperimentConfig
from elman.data.datamodule import evaluation_loader
from elman.errors import ConfigError
from elman.models.language_model import LanguageModel
from elman.tasks.hardware import Precision, resolve_device, resolve_precision, set_threads
from elman.tasks.language_modeling import evaluate
from elman.tasks.metrics import Scores
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus, PreparedSplit
from elman.training.loading import LoadedModel
from elman.training.progress import Reporter


def _score(
    model: LanguageModel, split: PreparedSplit, data: DataConfig, device: torch.device, precision: Precision
) -> Scores:
    return evaluate(model, evaluation_loader(split, data, model.start_id), device, precision)


def score_test(
    model: LanguageModel, corpus: PreparedCorpus, data: DataConfig, device: torch.device, precision: Precision
) -> dict[str, float]:
    """The model's figures on the test split; none where there is no such split."""
    split = corpus.splits.get("test")
    if not isinstance(split, PreparedSplit):
        return {}
    return _score(model, split, data, device, precision).metrics("test", split)


def evaluate_model(
    loaded: LoadedModel, config: ExperimentConfig, split: str, reporter: Reporter
) -> tuple[dict[str, float], int]:
    """Score a trained model on a split of any text, cut into tokens by the model's own vocabulary.

    Symbols that the vocabulary lacks are charged what spelling them costs (see elman.text.spelling).

    Args:
        loaded: The model.
        config: Its settings, with another corpus or other rows and windows where wanted.
        split: train, validation or test.
        reporter: Watches.

    Returns:
        Loss, perplexity, bits per byte and per character and accuracy, by name; and the tokens scored.

    Raises:
        ConfigError: There is no such split.
        DataError: The text cannot be used.
    """
    set_threads(config.trainer.threads)
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    if config.corpus.level != loaded.tokenizer.level:
        raise ConfigError(
            f"corpus.level must be {loaded.tokenizer.level}, the model's own, got {config.corpus.level!r}."
        )
    corpus = prepare(config.corpus, progress=reporter.stage, vocabulary=(loaded.tokenizer, loaded.spelling))
    found = corpus.splits.get(split)
    if not isinstance(found, PreparedSplit):
        names = ", ".join(name for name, s in corpus.splits.items() if isinstance(s, PreparedSplit))
        raise ConfigError(f"--split {split} does not exist in {corpus.name}: choose from {names}.")
    reporter.stage(f"scoring {split}")
    scores = _score(loaded.model, found, config.data, device, precision)
    return {key.partition("/")[2]: value for key, value in scores.metrics(split, found).items()}, scores.tokens
