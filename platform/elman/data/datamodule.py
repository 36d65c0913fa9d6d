"""From a prepared corpus to the loaders that Lightning walks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from elman.config.schema import DataConfig
from elman.data.windows import StreamLoader, TokenFile, Window, WindowLoader
from elman.errors import DataError
from elman.text.prepared import PreparedCorpus, PreparedSplit, StreamedSplit


def check_lengths(corpus: PreparedCorpus, config: DataConfig) -> None:
    """Refuse a corpus that cannot fill one window of one batch.

    Raises:
        DataError: The training split is shorter than that, or an evaluation split is empty.
    """
    train = corpus.splits["train"]
    needed = config.batch_size * config.sequence_length
    if isinstance(train, PreparedSplit) and train.tokens < needed:
        raise DataError(
            f"{corpus.source}: the training split has {train.tokens:,} tokens, fewer than one window of "
            f"{needed:,} (data.batch_size {config.batch_size} × data.sequence_length {config.sequence_length}): "
            "lower either, or use more text."
        )
    for name, split in corpus.splits.items():
        if isinstance(split, PreparedSplit) and split.tokens == 0:
            raise DataError(
                f"{corpus.source}: the {name} split is empty: raise corpus.{name}_fraction, or use more text."
            )


def evaluation_loader(split: PreparedSplit, config: DataConfig, start_id: int) -> WindowLoader:
    """Windows over a whole split for scoring it; short splits get fewer rows, so that each is a text, not a scrap."""
    file = TokenFile(split.path, split.dtype)
    return WindowLoader(
        file.tokens[: split.tokens],
        batch_size=max(1, min(config.evaluation_batch_size, split.tokens // config.sequence_length)),
        sequence_length=config.sequence_length,
        start_id=start_id,
        document_starts=split.document_starts if config.reset_at_documents else None,
        on_read=file.note_read,
    )


class CorpusData(L.LightningDataModule):
    """Windows over the splits of a prepared corpus.

    The training loader is made anew for every epoch (``reload_dataloaders_every_n_epochs=1``):
    its window lengths depend on the seed and the epoch, and on nothing else.

    Args:
        corpus: Prepared splits and their tokenizer.
        config: Rows and windows.
        seed: Seed of the window lengths.

    Raises:
        DataError: The corpus is too short for the configuration.
    """

    def __init__(self, corpus: PreparedCorpus, config: DataConfig, seed: int) -> None:
        super().__init__()
        check_lengths(corpus, config)
        self.corpus, self.config, self.seed = corpus, config, seed
        train = corpus.splits["train"]
        self._file = TokenFile(train.path, train.dtype) if isinstance(train, PreparedSplit) else None

    def train_loader(self, epoch: int) -> WindowLoader | StreamLoader:
        """The training windows of one epoch."""
        train, config = self.corpus.splits["train"], self.config
        start_id = self.corpus.tokenizer.start_id
        if isinstance(train, StreamedSplit):
            return StreamLoader(
                train.pieces,
                batch_size=config.batch_size,
                sequence_length=config.sequence_length,
                start_id=start_id,
                reset_at_documents=config.reset_at_documents,
            )
        assert self._file is not None
        return WindowLoader(
            self._file.tokens,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            start_id=start_id,
            variable_seed=(self.seed, epoch) if config.variable_length else None,
            document_starts=train.document_starts if config.reset_at_documents else None,
            on_read=self._file.note_read,
        )

    def windows_per_epoch(self) -> int | None:
        """Training windows in the first epoch (others differ where lengths are drawn); None for a stream."""
        loader = self.train_loader(0)
        return len(loader) if isinstance(loader, WindowLoader) else None

    def train_dataloader(self) -> WindowLoader | StreamLoader:
        """Lightning's hook."""
        return self.train_loader(self.trainer.current_epoch if self.trainer else 0)

    def val_dataloader(self) -> WindowLoader:
        """Lightning's hook."""
        return self._evaluation("validation")

    def test_dataloader(self) -> WindowLoader:
        """Lightning's hook."""
        return self._evaluation("test")

    def _evaluation(self, name: str) -> WindowLoader:
        split = self.corpus.splits[name]
        assert isinstance(split, PreparedSplit)
        return evaluation_loader(split, self.config, self.corpus.tokenizer.start_id)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: a Window is a NamedTuple with a flag in it, so it moves itself."""
        return batch.to(device, non_blocking=True) if isinstance(batch, Window) else batch
