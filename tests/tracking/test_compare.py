from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elman.config.schema import ExperimentConfig
from elman.config.tree import override
from elman.errors import TrackingError
from elman.tracking.compare import compare_runs, write_curves
from elman.tracking.local import RunSummary
from elman.tracking.plots import smoothed
from elman.tracking.store import RunStore


def run(store: RunStore, called: str, digest: str = "d", **settings: Any) -> RunSummary:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    with store.start_run(override(ExperimentConfig(), changes), called, {"corpus.digest": digest}) as made:
        for step in range(10):
            made.metrics.add({"train/bits_per_byte": 3 - step / 10}, step)
        made.metrics.add({"val/bits_per_byte": 2.5, "best/bits_per_byte": 2.5}, 9)
    return store.find_run(made.id)


@pytest.fixture
def store(workplace: Path) -> RunStore:
    return RunStore()


def test_only_settings_that_differ_are_shown(store: RunStore) -> None:
    first, second = run(store, "a", model__hidden_size=8), run(store, "b", model__hidden_size=16, name="other")
    comparison = compare_runs([first, second])
    assert comparison.settings == {"model.hidden_size": ["8", "16"]}
    assert comparison.metrics == {"best/bits_per_byte": [2.5, 2.5]}
    assert comparison.notes == []


def test_runs_on_different_corpora_are_compared_with_a_warning(store: RunStore) -> None:
    comparison = compare_runs([run(store, "a"), run(store, "b", "e", corpus__name="python-docs")])
    assert any("different corpora" in note for note in comparison.notes)


def test_runs_on_different_texts_of_one_name_are_refused(store: RunStore) -> None:
    with pytest.raises(TrackingError, match="its text differed"):
        compare_runs([run(store, "a", "one"), run(store, "b", "two")])


def test_the_curves_are_drawn(store: RunStore, tmp_path: Path) -> None:
    path = tmp_path / "new" / "curves.png"
    write_curves(store, [run(store, "a"), run(store, "a")], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_smoothing_is_a_running_mean() -> None:
    assert smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert smoothed([5, 1], 1) == [5, 1]
