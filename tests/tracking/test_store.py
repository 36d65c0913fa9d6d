from __future__ import annotations

import signal
from pathlib import Path

import pytest

from elman.config.schema import ExperimentConfig, TrackingConfig
from elman.config.tree import flatten, override
from elman.errors import TrackingError, without_password
from elman.tracking.store import RunStore, StoppedError


@pytest.fixture
def store(workplace: Path) -> RunStore:
    return RunStore(TrackingConfig(experiment="tests"))


def test_a_run_that_ends_well_is_finished_and_holds_every_setting_whole(store: RunStore) -> None:
    config = override(ExperimentConfig(), {"corpus.name": "x" * 700, "model.variational": ["input"]})
    with store.start_run(config, "a run", {"colour": "blue"}) as run:
        assert store.find_run(run.id).status == "RUNNING"
    found = store.find_run(run.id)
    assert (found.status, found.name, found.tags["colour"]) == ("FINISHED", "a run", "blue")
    assert set(found.params) == set(flatten(config))
    assert found.params["corpus.name"] == "x" * 700
    assert found.params["model.variational"] == '["input"]'
    assert found.params["trainer.max_steps"] == "null"


@pytest.mark.parametrize(
    ("error", "status", "tag"),
    [
        (ValueError("no luck\nsecond line"), "FAILED", "no luck"),
        (StoppedError(signal.SIGTERM), "KILLED", None),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
    ],
)
def test_the_status_of_a_run_that_ends_badly_is_true(
    store: RunStore, error: BaseException, status: str, tag: str | None
) -> None:
    with pytest.raises(type(error)), store.start_run(ExperimentConfig(), "r", {}) as run:
        raise error
    found = store.find_run(run.id)
    assert (found.status, found.tags.get("error")) == (status, tag)


def test_metrics_arrive_complete_and_in_order(store: RunStore) -> None:
    with store.start_run(ExperimentConfig(), "r", {}) as run:
        for step in range(2500):
            run.metrics.add({"train/loss": 1 / (step + 1)}, step)
        run.metrics.add({"train/perplexity": float("inf")}, 0)
    assert store.history(run.id, "train/loss") == [(s, 1 / (s + 1)) for s in range(2500)]
    assert store.find_run(run.id).metrics["train/perplexity"] > 1e308


def test_metrics_wait_for_a_store_that_is_away_and_arrive_later(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.start_run(ExperimentConfig(), "r", {}) as run:
        run.flush()
        with monkeypatch.context() as patch:
            def away(*arguments: object, **named: object) -> None:
                raise OSError("no route")

            patch.setattr(store.client, "log_batch", away)
            run.metrics.add({"a": 1.0}, 1)
            run.sender.attempt()
            assert (run.sender.reason, run.metrics.waiting()) == ("no route", 1)
            run.sender.attempt()
        run.metrics.add({"a": 2.0}, 2)
    assert store.history(run.id, "a") == [(1, 1.0), (2, 2.0)]


def test_artifacts_and_data_sets_can_be_read_back(store: RunStore, tmp_path: Path) -> None:
    with store.start_run(ExperimentConfig(), "r", {}) as run:
        run.log_text("samples.txt", "one")
        run.log_text("samples.txt", "one\ntwo")
        run.log_dataset(name="c", digest="d" * 64, source="s", splits={"train": {"tokens": 3}})
    assert store.download(run.id, "samples.txt", tmp_path).read_text() == "one\ntwo"
    assert store.download(run.id, "config.yaml", tmp_path).read_text().startswith("name: default")
    [entry] = store.client.get_run(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.tags[0].value) == ("c/train", "train")
    with pytest.raises(TrackingError, match="no artifact"):
        store.download(run.id, "nothing.txt", tmp_path)


def test_a_run_is_found_by_the_start_of_its_id_and_by_its_name(store: RunStore) -> None:
    with store.start_run(ExperimentConfig(), "first", {}) as run:
        pass
    assert store.find_run(run.id[:10]).id == store.find_run("first").id == run.id
    for absent in ("0" * 32, "nobody"):
        with pytest.raises(TrackingError, match="There is no run"):
            store.find_run(absent)


def test_runs_can_be_filtered_and_sorted(store: RunStore) -> None:
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        with store.start_run(override(ExperimentConfig(), {"seed": int(value)}), name, {}) as run:
            run.metrics.add({"test/bits_per_byte": value}, 1)
    assert [r.name for r in store.runs(order_by=["metrics.`test/bits_per_byte` ASC"])] == ["b", "c", "a"]
    assert [r.name for r in store.runs(filter_string="params.seed = '2'")] == ["c"]
    assert [r.name for r in store.runs(limit=1)] == ["c"]
    with pytest.raises(TrackingError, match="MLflow refuses that"):
        store.runs(filter_string="nonsense ((")


def test_a_store_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").write_text("a file in the way")
    with pytest.raises(TrackingError, match=r"mlruns cannot be written") as refusal:
        RunStore()
    assert "\n" not in str(refusal.value)


def test_a_server_that_is_away_is_one_clear_line_without_its_password() -> None:
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127\.0\.0\.1:9") as refusal:
        RunStore(TrackingConfig(uri="http://me:secret@127.0.0.1:9"))
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_passwords_are_cut_out_of_addresses() -> None:
    assert without_password("postgresql://me:pw@host/db") == "postgresql://***@host/db"
    assert without_password("http://host:80/a@b") == "http://host:80/a@b"


def test_a_password_in_the_settings_does_not_reach_the_run(store: RunStore, tmp_path: Path) -> None:
    config = override(ExperimentConfig(), {"tracking.uri": "http://me:canary@host"})
    with store.start_run(config, "r", {}) as run:
        pass
    assert "canary" not in str(store.find_run(run.id))
    assert "canary" not in store.download(run.id, "config.yaml", tmp_path).read_text()
