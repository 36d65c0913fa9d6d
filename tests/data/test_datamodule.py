from __future__ import annotations

from pathlib import Path

import pytest

from elman.data.datamodule import CorpusData
from elman.errors import DataError
from elman.text.prepare import prepare
from support import make_text, tiny


def test_a_corpus_shorter_than_one_batch_of_windows_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words only, no more than that\n")
    config = tiny(path)
    sizes = r"fewer than one window of 128 \(data.batch_size 8 × data.sequence_length 16\)"
    with pytest.raises(DataError, match=sizes):
        CorpusData(prepare(config.corpus), config.data, config.seed)


def test_a_short_validation_split_gets_fewer_rows(text_file: Path) -> None:
    config = tiny(text_file, corpus__validation_fraction=0.005)
    data = CorpusData(prepare(config.corpus), config.data, config.seed)
    [rows] = {window.inputs_BT.shape[0] for window in data.val_dataloader()}
    assert rows < config.data.evaluation_batch_size


def test_window_lengths_differ_between_epochs_and_repeat_with_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(make_text(20_000))
    config = tiny(path, data__variable_length=True, data__sequence_length=40)
    corpus = prepare(config.corpus)

    def lengths(seed: int, epoch: int) -> list[int]:
        loader = CorpusData(corpus, config.data, seed).train_loader(epoch)
        return [window.inputs_BT.shape[1] for window in loader]

    assert lengths(1, 0) == lengths(1, 0)
    assert lengths(1, 0) != lengths(1, 1)
    assert lengths(1, 0) != lengths(2, 0)


def test_a_streamed_corpus_gives_windows(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(make_text(8000))
    config = tiny(path, corpus__streaming=True, corpus__streaming_sample=5000, trainer__max_steps=5)
    data = CorpusData(prepare(config.corpus), config.data, config.seed)
    assert data.windows_per_epoch() is None
    windows = list(data.train_dataloader())
    assert sum(int((w.targets_BT >= 0).sum()) for w in windows) > 30_000
