"""Corpus: a named text, a local file or a hub data set, as a stream for each split.

Texts are read through ``datasets``, which is imported when the first one is read: opening a
corpus only finds it, checks what can be checked at once, and computes its digest.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from elman.config.schema import CorpusConfig
from elman.errors import ConfigError, DataError
from elman.text.builtin import BUILTINS, builtin_splits, digest_builtin, read_builtin
from elman.text.files import digest_files, find_files, group_by_split
from elman.text.hub import OFFLINE_CHOICES, resolve_commit
from elman.text.presets import PRESETS, Preset
from elman.text.readers import Batch, as_row, check_row, in_batches, missing_column, read_file
from elman.text.splitting import cut, cut_streamed
from elman.text.streams import ChainStream, RangeStream, Stream

_ROWS_AT_ONCE = 256
_HUB_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass
class Corpus:
    """A text, found but not yet read.

    Attributes:
        source: Path, address or description of where it is from.
        citation: Whom to cite; empty for a file of the user's.
        digest: SHA-256 that changes with the content: of a file's bytes, a built-in's text, or a
            hub data set's repository, configuration and commit.
        rows_are_lines: Whether rows are lines of running text rather than documents.
        warnings: What the user should know.
    """

    name: str
    source: str
    citation: str
    digest: str
    rows_are_lines: bool
    warnings: list[str]
    _open: Callable[[], dict[str, Stream]] = field(repr=False)
    _config: CorpusConfig = field(repr=False)

    @cached_property
    def splits(self) -> dict[str, Stream]:
        """Streams of train, validation and, where there is one, test. Counts characters where splits are cut.

        Raises:
            DataError: If the hub has no such configuration or split, or a text cannot be read.
        """
        return self._opened[0]

    @property
    def sample(self) -> Stream:
        """The training text that makes the vocabulary: all of it, or the start of a streamed one."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[dict[str, Stream], Stream]:
        streams = self._open()
        if self._config.streaming:
            return cut_streamed(streams, self._config)
        streams = cut(streams, self._config)
        return streams, streams["train"]


def open_corpus(config: CorpusConfig) -> Corpus:
    """Find a corpus and check what can be checked without reading it.

    Raises:
        DataError: If it is missing, unreadable, empty or out of reach.
        ConfigError: If a setting does not apply to this kind of corpus.
    """
    corpus = _find(config)
    for split in ("validation", "test"):
        name: str | None = getattr(config, f"{split}_file")
        if name is not None:
            _override(corpus, split, name, config)
    return corpus


def _find(config: CorpusConfig) -> Corpus:
    name = config.name
    if name in BUILTINS:
        _refuse_settings(config, "a built-in", "config", "split", "revision", "document_separator")
        return _built_in(config)
    if name in PRESETS:
        _refuse_settings(config, "a preset", "split", "document_separator")
        return _on_hub(config, PRESETS[name])
    if name.startswith("hub:"):
        _refuse_settings(config, "a hub data set", "document_separator")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository := name.removeprefix("hub:")):
            raise DataError(f"corpus.name: {name} names no data set: write hub:OWNER/NAME.")
        return _on_hub(config, Preset(repository=repository, column=config.column, citation="", licence="", splits=()))
    _refuse_settings(config, "a local file", "config", "split", "revision")
    files, warnings = find_files(name, "corpus.name", [*BUILTINS, *PRESETS])
    splits, more = group_by_split(files)
    return Corpus(
        name=Path(name).name or name,
        source=str(Path(name).expanduser().absolute()),
        citation="",
        digest=digest_files(splits),
        rows_are_lines=False,
        warnings=[*warnings, *more],
        _open=lambda: {split: _files_stream(paths, config) for split, paths in splits.items()},
        _config=config,
    )


def _refuse_settings(config: CorpusConfig, kind: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise ConfigError(
                f"corpus.{name} does not apply to {config.name}, which is {kind}: leave it null "
                f"(got {getattr(config, name)!r})."
            )


def _override(corpus: Corpus, split: str, name: str, config: CorpusConfig) -> None:
    """Put the files of ``corpus.validation_file`` or ``corpus.test_file`` in the place of a split."""
    files, warnings = find_files(name, f"corpus.{split}_file")
    digest = digest_files({split: files})
    inner = corpus._open
    corpus._open = lambda: inner() | {split: _files_stream(files, config)}
    corpus.digest = hashlib.sha256(f"{corpus.digest}\n{split} {digest}\n".encode()).hexdigest()
    corpus.warnings += warnings


def _built_in(config: CorpusConfig) -> Corpus:
    fractions = (config.validation_fraction, config.test_fraction)

    def streams() -> dict[str, Stream]:
        names = [split for split in builtin_splits(config.name) if split != "test" or config.test_fraction > 0]
        reads = {split: partial(read_builtin, config.name, split, fractions) for split in names}
        return {split: _LocalStream(read, f"corpus.name {config.name}", None) for split, read in reads.items()}

    return Corpus(
        name=config.name,
        source=BUILTINS[config.name],
        citation=BUILTINS[config.name],
        digest=digest_builtin(config.name),
        rows_are_lines=False,
        warnings=[],
        _open=streams,
        _config=config,
    )


@dataclass(frozen=True)
class _LocalStream:
    """Text that we read ourselves, handed through ``datasets``."""

    read: Callable[[], Iterator[Batch]]
    described: str
    size: int | None

    def batches(self) -> Iterator[Batch]:
        import datasets

        examples = datasets.IterableDataset.from_generator(_examples, gen_kwargs={"read": self.read})
        blank = True
        for example in examples:
            blank = blank and all(text.isspace() for text in example["text"])
            yield list(zip(example["text"], example["starts"], strict=True))
        if blank:
            raise DataError(f"{self.described}: holds nothing but white space: name a text with words in it.")


def _examples(read: Callable[[], Iterator[Batch]]) -> Iterator[dict[str, Any]]:
    """Batches in the form that ``datasets`` carries."""
    for batch in read():
        yield {"text": [text for text, _ in batch], "starts": [starts for _, starts in batch]}


def _files_stream(files: list[Path], config: CorpusConfig) -> Stream:
    parquet = [path for path in files if path.suffix.lower() == ".parquet"]
    plain = [path for path in files if path not in parquet]
    parts: list[Stream] = [
        _RowStream("parquet", {"data_files": [str(path)]}, "train", config.column, str(path), config.encoding_errors,
                   streaming=True, size=path.stat().st_size)
        for path in parquet
    ]  # fmt: skip
    if plain:
        read = partial(_read_files, tuple(plain), config.column, config.document_separator, config.encoding_errors)
        described = str(plain[0]) if len(plain) == 1 else f"{plain[0]} and {len(plain) - 1} more files"
        parts.append(_LocalStream(read, described, sum(path.stat().st_size for path in plain)))
    return parts[0] if len(parts) == 1 else ChainStream(parts)


def _read_files(files: tuple[Path, ...], column: str, separator: str | None, encoding_errors: str) -> Iterator[Batch]:
    for path in files:
        yield from read_file(path, column, separator, encoding_errors)


@dataclass(frozen=True)
class _RowStream:
    """Rows of a data set that ``datasets`` reads by itself: Parquet files, or one on the hub."""

    path: str
    arguments: dict[str, Any]
    split: str
    column: str
    described: str
    encoding_errors: str
    streaming: bool
    size: int | None = None

    def batches(self) -> Iterator[Batch]:
        yield from in_batches((text, True) for text in self._rows())

    def _rows(self) -> Iterator[str]:
        import datasets

        with _told(self.described):
            rows = datasets.load_dataset(self.path, split=self.split, streaming=self.streaming, **self.arguments)
            columns = list(rows.column_names or next(iter(rows), {}))
        if self.column not in columns:
            raise missing_column(self.described, self.column, columns)
        number = 0
        groups = iter(rows.select_columns([self.column]).iter(batch_size=_ROWS_AT_ONCE))
        while True:
            with _told(self.described):
                group = next(groups, None)
            if group is None:
                return
            for text in group[self.column]:
                number += 1
                yield as_row(check_row(text, f"{self.described}: row {number}", self.encoding_errors))


@contextmanager
def _told(described: str) -> Iterator[None]:
    """Turn what ``datasets`` raises into one line of ours; it logs the same error on its own account."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # it raises errors of five libraries, without a common base
        message = " ".join(str(error).split())[:300]
        if "BatchSize must be greater than 0" in message:  # what it makes of a Parquet file without a row
            raise DataError(f"{described}: holds no rows: name a file that holds text.") from error
        remedy = f" {OFFLINE_CHOICES}" if isinstance(error, ConnectionError) else ""
        raise DataError(f"{described}: cannot be read: {type(error).__name__}: {message}{remedy}") from error


def _on_hub(config: CorpusConfig, preset: Preset) -> Corpus:
    revision = config.revision or preset.revision
    configuration = config.config or preset.config
    commit = resolve_commit(preset.repository, revision)
    described = f"hub:{preset.repository}"
    if Path(preset.repository).exists():  # `datasets` would read that instead, and say nothing
        raise DataError(
            f"{described}: a file or folder {preset.repository} stands here, and would be read in its place: "
            "give its path as corpus.name, or run elsewhere."
        )

    def stream(split: str) -> Stream:
        return _RowStream(
            preset.repository, {"name": configuration, "revision": commit}, split, preset.column, described,
            config.encoding_errors, streaming=config.streaming,
        )  # fmt: skip

    def streams() -> dict[str, Stream]:
        if preset.byte_ranges:
            whole, (first, second) = stream("train"), preset.byte_ranges
            return {
                "train": RangeStream(whole, 0, first, "bytes"),
                "validation": RangeStream(whole, first, second, "bytes"),
                "test": RangeStream(whole, second, None, "bytes"),
            }
        names = {split: split for split in preset.splits} or _hub_splits(described, preset.repository, configuration,
                                                                         commit, config.split)
        return {split: stream(name) for split, name in names.items()}

    facts = [preset.repository, configuration or "", commit]
    return Corpus(
        name=config.name,
        source=f"https://huggingface.co/datasets/{preset.repository} at {commit}",
        citation="; ".join(filter(None, [preset.citation, preset.licence])),
        digest=hashlib.sha256("\n".join(facts).encode()).hexdigest(),
        rows_are_lines=preset.rows_are_lines,
        warnings=[],
        _open=streams,
        _config=config,
    )


def _hub_splits(described: str, repository: str, configuration: str | None, commit: str, train: str | None,
                ) -> dict[str, str]:
    """The hub's name of each split of ours."""
    import datasets

    with _told(described):
        there = datasets.get_dataset_split_names(repository, configuration, revision=commit)
    train = train or "train"
    if train.split("[")[0] not in there:
        raise DataError(f"{described}: has no split {train!r}: set corpus.split to one of {', '.join(there)}.")
    found = {"train": train}
    for split, names in _HUB_SPLITS.items():
        official = next((name for name in names if name in there and name != train), None)
        if official:
            found[split] = official
    return found
