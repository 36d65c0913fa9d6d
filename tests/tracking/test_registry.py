from __future__ import annotations

from pathlib import Path

import pytest

from elman.config.schema import ExperimentConfig
from elman.tracking.registry import register
from elman.tracking.store import RunStore


@pytest.fixture
def store(workplace: Path) -> RunStore:
    return RunStore()


def add(store: RunStore, bits: float, digest: str = "d") -> tuple[str, bool]:
    with store.start_run(ExperimentConfig(), "r", {}) as run:
        run.log_text("model/x.txt", "x")
    return register(store, run.id, f"runs:/{run.id}/model", "bard", bits_per_byte=bits, digest=digest)


def champion(store: RunStore) -> str:
    return str(store.client.get_model_version_by_alias("bard", "champion").version)


def test_the_best_of_a_name_is_its_champion(store: RunStore) -> None:
    assert add(store, 2.0) == ("1", True)
    assert add(store, 2.5) == ("2", False)
    assert champion(store) == "1"
    assert add(store, 1.5) == ("3", True)
    assert champion(store) == "3"


def test_a_model_judged_on_another_corpus_does_not_dethrone_the_champion(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    add(store, 2.0)
    assert add(store, 1.0, digest="other") == ("2", False)
    assert champion(store) == "1"
    assert "another corpus" in caplog.text
