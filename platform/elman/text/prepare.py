"""Preparing: a corpus becomes files of tokens, cached under a key of its content and settings.

Everything is written into a temporary directory beside its place, flushed to the disk, and
renamed: what carries the final name is whole. A lock makes a second process wait for the first;
what a dead process left is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from elman.config.schema import CorpusConfig
from elman.errors import DataError
from elman.text.corpus import Corpus, open_corpus
from elman.text.encode import Advance, EncodedText, encode_stream, learn_vocabulary
from elman.text.prepared import PreparedCorpus, PreparedSplit, StreamedSplit
from elman.text.spelling import SpellingModel
from elman.text.streams import RangeStream, Stream, count_characters
from elman.text.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
Vocabulary = tuple[Tokenizer, SpellingModel | None]
"""A tokenizer, and what the symbols that it lacks cost to spell."""
Check = Callable[[PreparedCorpus], None]

_FORMAT = 2
_COUNTS = ("tokens", "characters", "bytes", "unknown_tokens", "unknown_types", "unknown_bits")
_NOT_IN_KEY = ("name", "validation_file", "test_file", "config", "split", "revision", "streaming_sample")


def default_cache() -> Path:
    """$ELMAN_CACHE, else $XDG_CACHE_HOME/elman, else ~/.cache/elman."""
    own, users = os.environ.get("ELMAN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(users or "~/.cache").expanduser() / "elman"


def prepare(
    config: CorpusConfig,
    cache: Path | None = None,
    progress: Progress | None = None,
    vocabulary: Vocabulary | None = None,
    check: Check | None = None,
) -> PreparedCorpus:
    """Tokens of a corpus, from the cache or made now.

    Args:
        config: Which corpus, and how it is cut into splits and tokens.
        cache: Directory of the cache; None takes ``default_cache()``.
        progress: Told the stage and how much of it is done, from 0 to 1.
        vocabulary: A trained model's, to score it on this text; None learns one from the training split.
        check: Raises an ElmanError where the tokens are of no use; then what was made for this call is not kept.

    Raises:
        DataError: If the corpus cannot be used as it is, or the cache cannot be written.
        ConfigError: If a setting does not apply to this kind of corpus.
    """
    corpus = open_corpus(config)
    folder = (cache or default_cache()).expanduser().absolute() / "corpora"
    target = folder / _key(config, corpus, vocabulary)
    if not _is_whole(target):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            with _locked(target, progress):
                if not _is_whole(target):
                    _make(target, config, corpus, progress, vocabulary, check)
        except OSError as error:
            place, why = str(error.filename or folder), error.strerror or error
            setting = "ELMAN_CACHE" if place.startswith(str(folder.parent)) else "HF_HOME"  # `datasets` keeps its own
            raise DataError(
                f"{place}: the cache cannot be written: {why}. Set {setting} to a directory with room."
            ) from error
    prepared = _load(target, corpus, config)
    if check is not None:
        check(prepared)
    return prepared


def _key(config: CorpusConfig, corpus: Corpus, vocabulary: Vocabulary | None) -> str:
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_KEY}
    own: dict[str, object] = {name: bool(getattr(config, name)) for name in ("validation_file", "test_file")}
    if config.streaming:
        own["streaming_sample"] = config.streaming_sample
    if vocabulary is not None:
        own["vocabulary"] = vocabulary[0].fingerprint
    facts = {"format": _FORMAT, "digest": corpus.digest, "split": config.split, "lines": corpus.rows_are_lines}
    return hashlib.sha256(json.dumps(settings | own | facts, sort_keys=True).encode()).hexdigest()[:32]


def _is_whole(target: Path) -> bool:
    """Whether a prepared corpus stands there with files of the sizes that it states."""
    try:
        facts = json.loads((target / "corpus.json").read_text(encoding="utf-8"))
        sizes = {name: (target / name).stat().st_size for name in facts["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(sizes == facts["files"])


@contextmanager
def _locked(target: Path, progress: Progress | None, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of one prepared corpus; tells whether it is held, which it is not only where nobody waits.

    Its file goes with it. Who waited for it holds a file that is gone, and begins again.
    """
    path = target.with_suffix(".lock")
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                if progress:
                    progress("waiting for another process that prepares this corpus", 0.0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _stands_at(path, lock.fileno()):
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _stands_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one of that name still."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left: a living one holds the lock of what it makes."""
    for leftover in folder.glob("*.tmp"):
        with _locked(leftover, None, wait=False) as held:
            if held:
                shutil.rmtree(leftover, ignore_errors=True)


def _make(
    target: Path, config: CorpusConfig, corpus: Corpus, progress: Progress | None, vocabulary: Vocabulary | None,
    check: Check | None,
) -> None:  # fmt: skip
    making = target.with_suffix(".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        facts = _write(making, config, corpus, progress, vocabulary)
        facts["files"] = {path.name: path.stat().st_size for path in sorted(making.iterdir())}
        _write_text(making / "corpus.json", json.dumps(facts, indent=1, ensure_ascii=False))
        _sync(making)
        if check is not None:
            check(_load(making, corpus, config))
        shutil.rmtree(target, ignore_errors=True)  # it is damaged, or we would not be here
        making.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write(
    folder: Path, config: CorpusConfig, corpus: Corpus, progress: Progress | None, vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """Write the tokenizer and every split; return what corpus.json is to hold."""
    _tell(progress, "opening", 0.0)
    streams = corpus.splits
    if vocabulary is None:
        with _stage(progress, "vocabulary", corpus.sample.size) as advance:
            vocabulary = learn_vocabulary(config, corpus.sample, advance)
    tokenizer, spelling = vocabulary
    _write_text(folder / "tokenizer.json", tokenizer.to_json())
    splits: dict[str, EncodedText] = {}
    for name, stream in streams.items():
        if name == "train" and config.streaming:
            continue
        with _stage(progress, name, stream.size) as advance:
            splits[name] = _write_split(folder, name, stream, tokenizer, spelling, advance, corpus.rows_are_lines)
        if not splits[name].tokens:
            raise _empty(name, config, splits)
        if name == "train" or (config.streaming and name == "validation"):  # streamed, only that can be looked at
            _refuse_monotony(folder, name, tokenizer, config)
    shared = {} if corpus.rows_are_lines else _shared(splits)
    return {
        "format": _FORMAT,
        "name": corpus.name,
        "source": corpus.source,
        "digest": corpus.digest,
        "corpus": asdict(config),
        "splits": {name: {field: getattr(text, field) for field in _COUNTS} for name, text in splits.items()},
        "shared_documents": shared,
        "spelling": None if spelling is None else spelling.bits_of_sign.tolist(),
        "warnings": [*_warn_of_shared(shared, splits), *_warn_of_cap(config, streams, splits)],
    }


def _write_split(folder: Path, name: str, stream: Stream, tokenizer: Tokenizer, spelling: SpellingModel | None,
                 advance: Advance, rows_are_lines: bool) -> EncodedText:
    with (folder / f"{name}.bin").open("wb") as sink:
        text = encode_stream(stream, tokenizer, spelling, sink, advance, hash_documents=not rows_are_lines)
        sink.flush()
        os.fsync(sink.fileno())
    with (folder / f"{name}.documents.npy").open("wb") as sink:
        np.save(sink, np.array(text.document_starts, dtype="<i8"))
        sink.flush()
        os.fsync(sink.fileno())
    return text


def _refuse_monotony(folder: Path, split: str, tokenizer: Tokenizer, config: CorpusConfig) -> None:
    """A text of one symbol, repeated, has nothing to predict, and every model of it is perfect."""
    tokens = np.memmap(folder / f"{split}.bin", dtype=tokenizer.dtype, mode="r")
    if not any((tokens[place : place + 2**20] != tokens[0]).any() for place in range(0, len(tokens), 2**20)):
        symbol = tokenizer.symbols[int(tokens[0])]
        name = {"train": "training"}.get(split, split)
        raise DataError(f"{config.name}: the {name} split is nothing but {symbol!r}, repeated: use another text.")


def _empty(name: str, config: CorpusConfig, splits: dict[str, EncodedText]) -> DataError:
    there = ", ".join(f"{other} {text.characters:,}" for other, text in splits.items() if text.tokens)
    remedy = f"raise corpus.{name}_fraction" if name != "train" else "lower corpus.validation_fraction"
    return DataError(
        f"{config.name}: the {name} split is empty (characters: {there or 'none at all'}): {remedy}, or name a longer "
        "text."
    )


def _shared(splits: dict[str, EncodedText]) -> dict[str, int]:
    """Documents of the second split that occur in the first."""
    hashes = {name: np.array(text.hashes, dtype=np.uint64) for name, text in splits.items()}
    pairs = [(a, b) for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))
             if a in hashes and b in hashes]  # fmt: skip
    return {f"{a}/{b}": int(np.isin(hashes[b], hashes[a]).sum()) for a, b in pairs}


def _warn_of_shared(shared: dict[str, int], splits: dict[str, EncodedText]) -> list[str]:
    warnings = []
    for pair, documents in shared.items():
        first, second = pair.split("/")
        if documents:
            whole = f"{documents:,} of the {len(splits[second].hashes):,} documents of {second}"
            warnings.append(f"{whole} also stand in {first}, word for word.")
    return warnings


def _warn_of_cap(config: CorpusConfig, streams: dict[str, Stream], splits: dict[str, EncodedText]) -> list[str]:
    if not config.streaming:
        return []
    limit = config.streaming_sample
    return [
        f"{name} was capped at corpus.streaming_sample, {limit:,} characters."
        for name in splits
        if isinstance(stream := streams[name], RangeStream)
        and stream.start == 0
        and count_characters(stream.base, limit + 1) > limit
    ]


def _load(target: Path, corpus: Corpus, config: CorpusConfig) -> PreparedCorpus:
    facts = json.loads((target / "corpus.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(target / "tokenizer.json")
    splits: dict[str, PreparedSplit | StreamedSplit] = {}
    if config.streaming:
        splits["train"] = StreamedSplit(stream=corpus.splits["train"], tokenizer=tokenizer, dtype=tokenizer.dtype)
    for name, counts in facts["splits"].items():
        starts = np.load(target / f"{name}.documents.npy", mmap_mode="r")
        splits[name] = PreparedSplit(
            path=target / f"{name}.bin", dtype=tokenizer.dtype, document_starts=starts, **counts
        )
    return PreparedCorpus(
        name=corpus.name,
        source=corpus.source,
        citation=corpus.citation,
        digest=corpus.digest,
        level=tokenizer.level,
        tokenizer=tokenizer,
        splits=splits,
        shared_documents=facts["shared_documents"],
        spelling=None if facts["spelling"] is None else SpellingModel.from_bits(facts["spelling"]),
        directory=target,
        warnings=[*corpus.warnings, *facts["warnings"]],
    )


def _tell(progress: Progress | None, stage: str, fraction: float) -> None:
    if progress:
        progress(stage, fraction)


@contextmanager
def _stage(progress: Progress | None, stage: str, size: int | None) -> Iterator[Advance]:
    """Report one stage; ``size`` in bytes stands for characters, so the fraction is about right."""
    done = 0

    def advance(characters: int) -> None:
        nonlocal done
        done += characters
        _tell(progress, stage, min(done / size, 0.99) if size else 0.0)

    _tell(progress, stage, 0.0)
    yield advance
    _tell(progress, stage, 1.0)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
