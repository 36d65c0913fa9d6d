from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.config.load import load_config
from elman.config.schema import ExperimentConfig, GenerationConfig
from elman.config.tree import flatten
from elman.errors import DataError, DivergenceError, ElmanError
from elman.tasks.generation import TextGenerator
from elman.tasks.schedule import Schedule
from elman.tracking.store import RunStore, StoppedError
from elman.training.evaluation import evaluate_model
from elman.training.experiment import run_experiment
from elman.training.loading import load_model
from elman.training.progress import Silence
from support import make_text, tiny


@pytest.fixture
def store(workplace: Path) -> RunStore:
    return RunStore()


def test_a_run_holds_everything_and_the_best_model_is_the_one_tested(
    store: RunStore, text_file: Path, tmp_path: Path
) -> None:
    config = tiny(text_file, trainer__max_steps=30, trainer__validate_every_steps=10, tracking__system_metrics=True)
    result = run_experiment(config, store)

    run = store.find_run(result.run_id)
    assert (run.status, run.name) == ("FINISHED", "tiny-lstm-1x16-character")
    assert set(flatten(config)) <= set(run.params)
    for name in ("train/loss", "train/bits_per_byte", "val/loss", "test/bits_per_byte", "test/accuracy", "optimizer/lr",
                 "optimizer/grad_norm", "throughput/tokens_per_second", "epoch", "model/parameters"):  # fmt: skip
        assert name in run.metrics, name
    assert [step for step, _ in store.history(run.id, "train/loss")] == list(range(1, 31))
    assert [step for step, _ in store.history(run.id, "val/loss")] == [10, 20, 30]
    best = min(value for _, value in store.history(run.id, "val/loss"))
    assert result.metrics["val/loss"] == pytest.approx(best, rel=1e-6)
    assert run.metrics["best/loss"] == result.metrics["val/loss"]
    assert run.metrics["model/parameters"] == result.parameters["total"]

    artifacts = {a.path for a in store.client.list_artifacts(run.id)}
    files = {"config.yaml", "tokenizer.json", "environment.json", "loss_curves.png", "samples.txt", "checkpoints"}
    assert files <= artifacts
    checkpoints = {a.path for a in store.client.list_artifacts(run.id, "checkpoints")}
    assert checkpoints == {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert not (Path("mlruns") / "checkpoints" / run.id).exists()
    samples = store.download(run.id, "samples.txt", tmp_path).read_text()
    assert samples.count(" ===\n") == 3
    assert max(map(len, samples.splitlines())) <= 100
    assert "| test |" in run.tags["mlflow.note.content"]
    assert load_config(ExperimentConfig, store.download(run.id, "config.yaml", tmp_path)) == config
    inputs = {entry.dataset.name: json.loads(entry.dataset.profile)
              for entry in store.client.get_run(run.id).inputs.dataset_inputs}  # fmt: skip
    assert set(inputs) == {"text.txt/train", "text.txt/validation", "text.txt/test"}
    assert sum(profile["bytes"] for profile in inputs.values()) == text_file.stat().st_size


def test_the_same_seed_gives_the_same_losses_to_the_bit_and_another_does_not(store: RunStore, text_file: Path) -> None:
    settings: dict[str, Any] = {"model__dropout": 0.3, "data__variable_length": True}

    def losses(seed: int) -> list[tuple[int, float]]:
        result = run_experiment(tiny(text_file, seed=seed, **settings), store)
        return store.history(result.run_id, "train/loss") + store.history(result.run_id, "val/loss")

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_training_lowers_the_loss_far_below_chance(store: RunStore, text_file: Path) -> None:
    config = tiny(text_file, trainer__max_steps=150, optimizer__lr=2e-2, model__hidden_size=32)
    result = run_experiment(config, store)
    assert result.metrics["test/loss"] < 0.75 * math.log(20)


@pytest.mark.parametrize(
    "settings",
    [
        {"model__cell": "rnn", "model__nonlinearity": "relu"},
        {"model__cell": "gru", "model__tie_weights": True, "model__layer_norm": True},
        {"model__cell": "gru_reset_before", "model__initial_state": "learned", "model__residual": True,
         "model__num_layers": 2},
        {"model__cell": "mingru", "model__initial_state": "learned", "model__num_layers": 2, "model__dropout": 0.2},
        {"model__cell": "minlstm", "model__layer_norm": True, "model__forget_bias": 0.0},
        {"model__cell": "transformer", "model__num_heads": 2},
        {"model__head": "last_step", "model__max_sequence_length": 8},
        {"model__weight_dropout": 0.5, "model__embedding_dropout": 0.1, "model__dropout": 0.2, "model__num_layers": 2,
         "model__variational": ["embedding", "input", "layer", "output"], "model__last_hidden_size": 8},
        {"model__parameter_budget": 5000, "model__forget_bias": 0.0},
        {"optimizer__name": "nt_asgd", "optimizer__lr": 1.0, "optimizer__schedule": "constant",
         "optimizer__nonmonotone_interval": 1, "trainer__validate_every_steps": 2},
        {"optimizer__name": "sgd", "optimizer__lr": 1.0, "optimizer__momentum": 0.9, "optimizer__nesterov": True,
         "optimizer__schedule": "step"},
        {"optimizer__name": "rmsprop", "optimizer__schedule": "plateau", "optimizer__max_grad_norm": None},
        {"optimizer__name": "adam", "optimizer__schedule": "one_cycle", "optimizer__warmup_steps": 3,
         "optimizer__weight_decay": 0.01, "optimizer__activation_regularization": 1.0,
         "optimizer__temporal_activation_regularization": 1.0},
        {"trainer__accumulate_windows": 3, "data__variable_length": True},
        {"trainer__precision": "bf16"},
        {"corpus__level": "byte"},
        {"corpus__level": "word", "corpus__min_count": 2},
        {"corpus__level": "bpe", "corpus__vocabulary_size": 300},
        {"corpus__test_fraction": 0.0},
        {"corpus__streaming": True, "corpus__streaming_sample": 8000},
        {"corpus__document_separator": "\n", "data__reset_at_documents": True},
    ],
    ids=lambda settings: " ".join(f"{k.split('__')[1]}={v}" for k, v in settings.items())[:60],
)  # fmt: skip
def test_every_setting_trains_saves_and_generates(store: RunStore, text_file: Path, settings: dict[str, Any]) -> None:
    result = run_experiment(tiny(text_file, **({"trainer__max_steps": 6} | settings)), store)
    assert math.isfinite(result.metrics["val/bits_per_byte"])
    loaded = load_model(result.run_id, store)
    generator = TextGenerator(loaded.model, loaded.tokenizer)
    assert len(generator.complete("", GenerationConfig(length=10))[0]) > 0


def test_averaged_weights_are_the_ones_kept_and_tested(store: RunStore, text_file: Path, tmp_path: Path) -> None:
    config = tiny(
        text_file, optimizer__name="nt_asgd", optimizer__lr=20.0, optimizer__schedule="constant",
        optimizer__nonmonotone_interval=1, trainer__validate_every_steps=2, trainer__max_steps=40,
        optimizer__max_grad_norm=None,
    )  # fmt: skip
    result = run_experiment(config, store)
    last = torch.load(store.download(result.run_id, "checkpoints/last.ckpt", tmp_path), weights_only=True)
    assert last["averaged"] is not None
    raw = {k.removeprefix("model."): v for k, v in last["state_dict"].items()}
    assert any(not torch.equal(raw[name], value) for name, value in last["averaged"].items())
    loaded = load_model(result.run_id, store)
    metrics, _ = evaluate_model(loaded, loaded.config, "validation", Silence())
    assert metrics["loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-6)


def test_divergence_fails_the_run_with_its_step_and_keeps_the_good_checkpoint(
    store: RunStore, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(self: Schedule, *, step: int, progress: float, epoch: int) -> float:
        return 1e-3 if step < 5 else 1e38

    monkeypatch.setattr(Schedule, "factor", explode)
    config = tiny(
        text_file, optimizer__name="sgd", optimizer__lr=1.0, optimizer__max_grad_norm=None,
        trainer__validate_every_steps=1,
    )  # fmt: skip
    with pytest.raises(DivergenceError, match=r"the loss is (nan|inf) at step \d+\. Usual remedies") as failure:
        run_experiment(config, store)
    [run] = store.runs()
    assert (run.status, run.tags["error"]) == ("FAILED", str(failure.value))
    loaded = load_model(run.id, store)
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_killed_and_keeps_its_newest_state(store: RunStore, text_file: Path, number: int) -> None:
    class Stopper(Silence):
        def step(self, progress: float, seconds_left: float, metrics: Any) -> None:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError) as stop:
        run_experiment(tiny(text_file, trainer__max_steps=1000), store, Stopper())
    assert stop.value.signal_number == number
    [run] = store.runs()
    assert run.status == "KILLED"
    assert [a.path for a in store.client.list_artifacts(run.id, "checkpoints")] == ["checkpoints/last.ckpt"]
    assert load_model(run.id, store).config.name == "tiny"


@pytest.mark.parametrize("moment", ["testing", "recording"])
def test_a_signal_after_the_last_step_stops_too(store: RunStore, text_file: Path, moment: str) -> None:
    class Stopper(Silence):
        def stage(self, name: str, fraction: float | None = None) -> None:
            if name.startswith(moment):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError) as stop:
        run_experiment(tiny(text_file, trainer__max_steps=3), store, Stopper())
    [run] = store.runs()
    assert (run.status, run.id) == ("KILLED", stop.value.run_id)
    assert load_model(run.id, store).config.name == "tiny"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_leaves_at_once_and_the_status_is_still_true(store: RunStore, text_file: Path) -> None:
    class Stopper(Silence):
        def validated(self, epoch: float, step: int, metrics: Any, is_best: bool) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the second was waited for")

    with pytest.raises(StoppedError):
        run_experiment(tiny(text_file), store, Stopper())
    assert [run.status for run in store.runs()] == ["KILLED"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trainer__max_steps": 7}, "trainer.max_steps 7 reached"),
        ({"trainer__max_steps": None, "trainer__max_epochs": 2}, "all epochs done"),
        ({"trainer__max_steps": None, "trainer__max_epochs": 1, "trainer__validate_every_steps": 999}, "all epochs"),
        ({"trainer__max_minutes": 0.01, "trainer__max_steps": None, "trainer__max_epochs": 10_000}, "max_minutes 0.01"),
        ({"trainer__patience": 2, "trainer__validate_every_steps": 1, "optimizer__lr": 1e-12}, "trainer.patience 2"),
    ],
)
def test_training_ends_at_its_limit_says_which_and_has_validated(
    store: RunStore, text_file: Path, settings: dict[str, Any], reason: str
) -> None:
    result = run_experiment(tiny(text_file, **settings), store)
    assert reason in result.ended_by
    assert "val/loss" in result.metrics


def test_a_corpus_that_cannot_be_used_leaves_no_run(store: RunStore, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(make_text(10))
    with pytest.raises(DataError):
        run_experiment(tiny(short), store)
    with pytest.raises(ElmanError):
        run_experiment(tiny(tmp_path / "missing.txt"), store)
    assert store.runs() == []


def test_the_best_of_a_registered_name_is_champion_and_loads_by_alias(store: RunStore, text_file: Path) -> None:
    poor = run_experiment(tiny(text_file, trainer__max_steps=2, tracking__register="bard"), store)
    good = run_experiment(tiny(text_file, trainer__max_steps=60, tracking__register="bard"), store)
    worse = run_experiment(tiny(text_file, trainer__max_steps=1, tracking__register="bard"), store)
    assert [r.registered for r in (poor, good, worse)] == [
        "models:/bard/1 (champion)", "models:/bard/2 (champion)", "models:/bard/3",
    ]  # fmt: skip
    config = GenerationConfig(length=30)
    expected = load_model(good.run_id, store)
    champion = load_model("models:/bard@champion", store)
    texts = [TextGenerator(m.model, m.tokenizer).complete("ba", config) for m in (expected, champion)]
    assert texts[0] == texts[1]


def test_a_training_in_a_thread_works_though_it_cannot_handle_signals(store: RunStore, text_file: Path) -> None:
    results: list[Any] = []
    config = tiny(text_file, trainer__max_steps=3)
    thread = threading.Thread(target=lambda: results.append(run_experiment(config, store)))
    thread.start()
    thread.join()
    assert len(results) == 1
