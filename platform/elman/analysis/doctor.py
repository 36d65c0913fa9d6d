"""``elman doctor``: what a training stands on, and whether the sequence model is what it says it is.

A configuration is examined on a small model with its cell, dropout, tying and head, and with
the beginning of its corpus; a trained model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch

from elman.analysis import surroundings
from elman.analysis.finding import Finding, Outcome, check, failure, ok, warning
from elman.analysis.soundness import examine_model
from elman.analysis.specimen import Specimen
from elman.config.schema import CorpusConfig, ExperimentConfig, ModelConfig
from elman.errors import ConfigError, DataError, ModelError
from elman.models.language_model import LanguageModel, build_model
from elman.tasks.hardware import set_threads
from elman.text.corpus import open_corpus
from elman.text.encode import learn_vocabulary
from elman.text.hub import OFFLINE_CHOICES
from elman.text.prepare import prepare
from elman.text.prepared import PreparedSplit
from elman.text.streams import Stream
from elman.text.tokenizer import Tokenizer
from elman.tracking.absence import StoreAwayError
from elman.tracking.store import RunStore
from elman.training.loading import LoadedModel, load_model, needs_store

CHARACTERS = 100_000
"""Of the corpus that are read: enough for a vocabulary to examine, and no corpus is fetched for it."""

NARROW, WIDE = 32, 48
"""Widths of the small model."""

CONTEXT = 16
"""Tokens that the small model's transformer looks back, and the padded window of head last_step."""

LAYERS = 3


def examine(config: ExperimentConfig, reference: str | None = None) -> Iterator[Finding]:
    """Every finding, as it is made.

    Args:
        config: What is to be trained; its tracking store and hardware are examined with it.
        reference: A MODEL to examine instead of the configuration's.

    Raises:
        ElmanError: There is no such MODEL, or it does not load.
    """
    set_threads(config.trainer.threads)
    try:
        loaded = None if reference is None else _load(reference, config)
    except StoreAwayError as error:
        away = Finding("model", "failure", f"{reference} cannot be fetched: {error.reason}", "see tracking store.")
        return chain(_surroundings(config), [away])
    if loaded is None:
        return chain(_surroundings(config), _configured(config))
    return chain(_surroundings(config), _trained(loaded, config.corpus))


def _load(reference: str, config: ExperimentConfig) -> LoadedModel:
    if not needs_store(reference):
        return load_model(reference)
    if surroundings.is_unmade(config.tracking):  # to look there would make it
        raise ModelError(f"There is no model {reference}, for nothing is recorded here yet: `elman train` does.")
    return load_model(reference, RunStore(config.tracking))


def _surroundings(config: ExperimentConfig) -> Iterator[Finding]:
    yield surroundings.python()
    yield from surroundings.packages()
    yield surroundings.processor(config.trainer)
    yield surroundings.gpu(config.trainer)
    yield surroundings.kernel()
    yield surroundings.store(config.tracking)
    yield from surroundings.disk()
    yield surroundings.hub()


# A configuration --------------------------------------------------------------------------


def _configured(config: ExperimentConfig) -> Iterator[Finding]:
    corpus = config.corpus
    finding = readable(config)
    yield finding
    if finding.status != "ok":  # the model can be examined all the same
        corpus = CorpusConfig(level=corpus.level, vocabulary_size=corpus.vocabulary_size, min_count=corpus.min_count)
    sample = _sample(corpus)
    tokenizer, _ = learn_vocabulary(corpus, sample, lambda _: None)
    complete = corpus.vocabulary_size is None and corpus.min_count == 1
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = small_model(config.model, tokenizer)
    yield from examine_model(Specimen(model, tokenizer, _text(sample), True, complete))


@check("corpus")
def readable(config: ExperimentConfig) -> Outcome:
    """Whether the corpus can be read, and fills a window."""
    corpus = config.corpus
    try:
        text = _text(_sample(corpus))
        if len(text) < CHARACTERS // 2 and not corpus.streaming:  # it is short: all of it, and is it long enough?
            from elman.data.datamodule import check_lengths  # brings lightning, and takes seconds

            prepared = prepare(corpus, check=lambda made: check_lengths(made, config.data))
            train = prepared.splits["train"]
            assert isinstance(train, PreparedSplit)
            return ok(f"{corpus.name}: {train.characters:,} characters to train on, {train.tokens:,} tokens")
    except (DataError, ConfigError) as error:
        instead = "the model is examined on text of bible-asv instead."
        if OFFLINE_CHOICES in str(error):  # to be without a network is a normal way to work
            return warning(str(error).replace(f" {OFFLINE_CHOICES}", ""), f"{OFFLINE_CHOICES} Meanwhile, {instead}")
        return failure(str(error), f"mend corpus.name or the text; {instead}")
    return ok(f"{corpus.name}: its first {len(text):,} characters can be read")


def _sample(corpus: CorpusConfig) -> Stream:
    """The beginning of a corpus, whatever its size."""
    return open_corpus(
        replace(corpus, streaming=True, streaming_sample=CHARACTERS, folds=None, fold=0, training_fraction=1.0)
    ).sample


def _text(sample: Stream) -> str:
    return "".join(text for batch in sample.batches() for text, _ in batch)


def small_model(config: ModelConfig, tokenizer: Tokenizer) -> LanguageModel:
    """A model of this architecture that takes a moment: narrow and shallow, but built the same."""
    step = 2 * config.num_heads if config.cell == "transformer" else 1
    wide = -(-WIDE // step) * step
    is_square = config.embedding_size == config.hidden_size and config.parameter_budget is None
    embedding_size = wide if is_square else NARROW
    last = config.last_hidden_size
    small = replace(
        config,
        embedding_size=embedding_size,
        hidden_size=wide,
        last_hidden_size=None if last is None else embedding_size if last == config.embedding_size else WIDE - 8,
        parameter_budget=None,
        num_layers=min(config.num_layers, LAYERS),
        max_sequence_length=min(config.max_sequence_length, CONTEXT),
        cutoffs=tuple(first for first in config.cutoffs if first < tokenizer.vocabulary_size),
    )
    sizes = {"vocabulary_size": tokenizer.vocabulary_size, "num_inputs": tokenizer.num_inputs}
    return build_model(small, **sizes, start_id=tokenizer.start_id, context_length=CONTEXT)


# A trained model --------------------------------------------------------------------------


def _trained(loaded: LoadedModel, corpus: CorpusConfig) -> Iterator[Finding]:
    config = loaded.config.corpus if corpus == CorpusConfig() else corpus
    yield Finding("model", "ok", f"{loaded.config.name}: {_described(loaded.model.config)}")
    try:
        found = open_corpus(config)
        text = _text(_sample(config))
    except (DataError, ConfigError) as error:
        yield Finding("corpus", "warning", f"{error}", "the model is examined on text of bible-asv instead.")
        text, is_own = _text(_sample(CorpusConfig())), False
    else:
        is_own = found.digest == loaded.corpus_digest
        yield _own_text(config.name, is_own)
    complete = is_own and config.vocabulary_size is None and config.min_count == 1 and config.training_fraction == 1
    yield from examine_model(Specimen(loaded.model, loaded.tokenizer, text, False, complete and not config.streaming))


@check("corpus")
def _own_text(name: str, is_own: bool) -> Outcome:
    if is_own:
        return ok(f"{name}: the text that the model was trained on")
    return warning(f"{name} is not the text that the model was trained on", "--corpus.name names another.")


def _described(config: ModelConfig) -> str:
    return f"{config.num_layers} × {config.cell} of {config.hidden_size}"
