"""Splitting: what splits a corpus lacks are cut off its training text, as contiguous ranges of characters.

Never shuffled: over running text, shuffling would put the neighbours of every held-out line into training.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from elman.config.schema import CorpusConfig
from elman.text.streams import ChainStream, RangeStream, SharedStream, Stream, ThinnedStream, count_characters


def cut(streams: dict[str, Stream], config: CorpusConfig) -> dict[str, Stream]:
    """Cut what splits are wanting off the end of the training text, as contiguous ranges of characters.

    With ``corpus.folds``, all that training and validation would share is cut into that many blocks
    instead, one of which is held out: for blocked cross-validation. An official validation split stays
    out of it.

    Source: Burman, Chow & Nolan (1994), doi:10.1093/biomet/81.2.351 (blocks of dependent data, with a gap).
    """
    if config.training_fraction < 1:
        whole = cut(streams, replace(config, training_fraction=1.0))
        train = whole["train"]
        return whole | {"train": ThinnedStream(train, count_characters(train), config.training_fraction)}
    if config.folds is not None:
        return _fold(streams, config)
    validation, test = _wanting(streams, config)
    if not validation and not test:
        return _in_order(streams)
    base = SharedStream(streams["train"])
    characters = count_characters(base)
    first, second = int(characters * (1 - validation - test)), int(characters * (1 - test))
    parts: dict[str, Stream] = {"train": RangeStream(base, 0, first)}
    if validation:
        parts["validation"] = RangeStream(base, first, second)
    if test:
        parts["test"] = RangeStream(base, second, characters)
    return _in_order(streams | parts)


def _fold(streams: dict[str, Stream], config: CorpusConfig) -> dict[str, Stream]:
    assert config.folds is not None
    parts = {split: stream for split, stream in streams.items() if split == "test"}
    base = SharedStream(streams["train"])
    characters = total = count_characters(base)
    _, test = _wanting(streams, config)
    if test:
        total = int(characters * (1 - test))
        parts["test"] = RangeStream(base, total, characters)
    begin, end = (total * i // config.folds for i in (config.fold, config.fold + 1))
    rest = []
    if begin - config.fold_gap > 0:
        rest.append(RangeStream(base, 0, begin - config.fold_gap))
    if end + config.fold_gap < total:
        rest.append(RangeStream(base, end + config.fold_gap, total))
    return _in_order(parts | {"train": ChainStream(rest), "validation": RangeStream(base, begin, end)})


def cut_streamed(streams: dict[str, Stream], config: CorpusConfig) -> tuple[dict[str, Stream], Stream]:
    """Cut what splits are wanting off the end of the sample; the vocabulary comes from the sample's rest."""
    base, limit = streams["train"], config.streaming_sample
    capped = {split: RangeStream(stream, 0, limit) for split, stream in streams.items() if split != "train"}
    validation, test = _wanting(streams, config)
    if not validation and not test:
        return _in_order({"train": base} | capped), RangeStream(base, 0, limit)
    characters = count_characters(base, limit)
    first, second = int(characters * (1 - validation - test)), int(characters * (1 - test))
    sample = RangeStream(base, 0, first)
    parts: dict[str, Stream] = {"train": ChainStream([sample, RangeStream(base, characters)])}
    if validation:
        parts["validation"] = RangeStream(base, first, second)
    if test:
        parts["test"] = RangeStream(base, second, characters)
    return _in_order(capped | parts), sample


def _wanting(streams: dict[str, Stream], config: CorpusConfig) -> tuple[Fraction, Fraction]:
    """Shares of validation and test to be cut. A corpus with an official validation and no test stays without."""
    official = "validation" in streams and config.validation_file is None
    exact = Fraction(str(config.validation_fraction)), Fraction(str(config.test_fraction))  # 1 - 0.1 is not 0.9
    return (
        exact[0] if "validation" not in streams else Fraction(0),
        exact[1] if "test" not in streams and not official else Fraction(0),
    )


def _in_order(streams: dict[str, Stream]) -> dict[str, Stream]:
    return {split: streams[split] for split in ("train", "validation", "test") if split in streams}
